"""The device: readings in, results and alerts out; the store is the only meeting place.

rows      columns of readings, packing, validation     store        open, read, one transaction at a time
parse     JSON lines to rows                           transaction  what can be written in one
readfile  CSV, JSON Lines, Parquet to rows             schema       tables, pragmas, longer statements
group     rows that wait for one commit                author       seq, prev and signature of each message
intake    sockets and sources, one commit for all      batch        one batch of one task
producer  one connection of the intake                 schedule     when a task is due
sources/  files, host, replay                          reports      health, events, broken bundles
uplink    connects, and comes back                     daemon       the loop around all of it
session   what goes when on one connection             notify       systemd
acknowledge  what may leave the outbox
"""
