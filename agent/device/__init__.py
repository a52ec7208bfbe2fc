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

opening   who may open the store, and whether it is sound   mounts     no network file systems
migrate   older stores, behind a backup                     watermark  how far the store had got, in a file beside it
salvage   a damaged store set aside, a new one in its place catchup    a store behind its watermark
copying   what can be read, and what is missing             findings   what an opening found, until it is said
readable, leaves  a damaged database, row by row            settle     says it, before anything else is sent
fork      the collector knows another history               relog      a new log, with what the collector lacks
checked, setaside  messages that the disk has changed       condition  all of that in a line, for people
"""
