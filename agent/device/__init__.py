"""The device: readings in, results and alerts out; the store is the only meeting place.

rows      columns of readings, packing, validation     store     all SQL of the device
parse     JSON lines to rows                           author    seq, prev and signature of each message
readfile  CSV, JSON Lines, Parquet to rows             batch     one batch of one task
intake    the socket, acknowledged after commit        schedule  when a task is due
sources/  files, host, replay                          uplink    outbox to broker, acknowledgements back
group     rows collected for one commit                daemon    the loop around all of it
"""
