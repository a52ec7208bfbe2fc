"""Opening a store that is not as it was left.

opening   who may open the store, and whether it is sound   mounts     no network file systems
migrate   older stores, behind a backup                     watermark  how far the store had got, in a file beside it
salvage   a damaged store set aside, a new one in its place catchup    a store behind its watermark
copying   what can be read, and what is missing             findings   what an opening found, until it is said
readable, leaves  a damaged database, row by row            settle     says it, before anything else is sent
fork      the collector knows another history               relog      a new log, with what the collector lacks
condition all of that in a line, for people
"""
