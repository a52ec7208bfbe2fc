"""The device: readings in, results and alerts out; the store is the only meeting place.

incoming/   sockets and sources to rows, one commit for all        batch        one batch of one task
storage/    the store: tables, transactions, quota, what goes      schedule     when a task is due
recovery/   a store that is damaged, behind, older or restored     author       seq, prev and signature of each message
outgoing/   the outbox over one connection, acknowledgements       reports      health, events, broken bundles
operating/  what operators may do: commands, keys, wipe            quality      labels joined, and what they say
notify      systemd                                                timekeeping  segments and anchors of the wall clock
                                                                   daemon       the loop around all of it
"""
