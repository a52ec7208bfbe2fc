"""Test kit for applications that send to or read from Outstation: real brokers, collectors and devices on loopback.

    broker.py      a Mosquitto broker that a test can kill and start again
    fleet.py       broker, collector and device daemons, each in a process
    lossy_link.py  a broker in memory whose links lose, delay, repeat, reorder and split messages, from a seed
    messages.py    a simulated device: signed, chained messages without any code of the device
    process.py     processes of the `outstation` command
    fixtures.py    all of it as pytest fixtures: `pytest_plugins = ["agent.testing.fixtures"]`

Nothing here is imported by a device or a collector.
"""
