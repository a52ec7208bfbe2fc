"""Machine: clock, schedules, throttling, signing keys and systemd of the device. Imports no device package but store.

timekeeping  clock quality, anchors   schedule  when a task is due   throttle  heat, power and battery
keys         key files, rotation      systemd   sd_notify
"""
