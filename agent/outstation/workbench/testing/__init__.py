"""Test kit for applications that send to or read from Outstation: real brokers, collectors and devices.

    fixtures.py         the pytest plugin
    simulated_fleet.py  many devices and a collector on a virtual clock
    fleet.py            broker, collector and device daemons, each in a process
    broker.py           a Mosquitto broker that a test can kill and start again
    simulation/         what simulates it, with a broker in memory whose links lose, delay, repeat and split messages
    messages.py         a simulated device: signed, chained messages without any code of the device
    process.py          processes of the `outstation` command
    patience.py         waits for events, whose limits a busy machine extends
    reasons.py          what a failed wait prints

Nothing here is imported by a device or a collector.
"""
