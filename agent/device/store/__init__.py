"""Device store: one SQLite file, one writing connection, one transaction at a time. Imports no other device package.

store, transaction   reading; writing               schema, meta, task_keys  tables; single values; names of task state
rows                 validation, packed chunks      clock_segments           wall clock of the rows' times
outbox, message_log  messages; seq and signature    retention                acknowledged seqs, growth
journal, small_commits  commits of a few rows       quota, watermark         bytes; detection of lost commits
labels, command_log  predictions and labels; commands of operators
cost, row_crc        accounting; checksums of rows
"""
