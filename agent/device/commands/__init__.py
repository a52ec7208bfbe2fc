"""What operators may do to a running device, each command signed, counted, answered and in the audit log.

commands   verified on the uplink's thread              control      claimed, done or refused, answered, once
actions    what each command about tasks does           commandbook  counters and answers, in the transaction
overrides  what was changed about a task                kept         copies of the bundles that ran
rotation, keyfiles  a new signing key                   wipe         erasing the device
machine    what the daemon hands over                   operations   all of it put together
"""
