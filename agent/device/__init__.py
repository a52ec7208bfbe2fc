"""The device: readings in, results and alerts out; the store is the only meeting place.

rows      columns of readings, packing, validation     store        open, read, one transaction at a time
parse     JSON lines to rows                           transaction  what can be written in one
readfile  CSV, JSON Lines, Parquet to rows             schema       tables, pragmas, longer statements
group     rows that wait for one commit                author       seq, prev and signature of each message
intake    the socket, acknowledged after commit        batch        one batch of one task
producer  one connection of the intake
sources/  files, host, replay                          schedule     when a task is due
uplink    outbox to broker, acknowledgements back      reports      health, events, broken bundles
daemon    the loop around all of it                    notify       systemd
"""
