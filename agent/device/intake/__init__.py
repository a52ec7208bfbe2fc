"""Readings on their way in: what is answered here is on the disk.

intake    sockets and sources, one commit for all        group     rows that wait for one commit
producer  one connection of the intake                   parse     JSON lines to rows
sources/  files, host, replay                            readfile  CSV, JSON Lines, Parquet to rows
"""
