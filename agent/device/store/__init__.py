"""Device store: one SQLite file, one writing connection, one transaction at a time. Imports no other device package.

store, transaction   reading; writing               schema, meta, task_keys  tables; single values; names of task state
rows, row_batch      packed chunks; reading them    clock_segments           wall clock of the rows' times
outbox, message_log  messages; seq and signature    retention                acknowledged seqs, growth
commits              journal of small commits, and the watermark that tells of lost ones
quota                bytes                          sqlite_errors            SQLite's errors as errors of storage
labels, predictions  labels; what they belong to    command_log              commands of operators
cost, row_crc        accounting; checksums of rows
"""
