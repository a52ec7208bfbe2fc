"""Machine: clock, schedules, throttling, signing keys and systemd of the device. Imports the store and no other package.

timekeeping  clock quality, anchors   schedule  when a task is due   throttle  heat, power and battery
keys         key files, rotation      systemd   sd_notify
"""
