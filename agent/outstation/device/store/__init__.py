"""Device store: one SQLite file, one writing connection, one transaction at a time. Imports no other device package.

store, transaction   reading; writing               task_keys                names of task state
rows, row_batch      packed chunks; reading them    clock_segments           wall clock of the rows' times
outbox, message_log  messages; seq and signature    retention                acknowledged seqs, growth
journal, small_commits  commits of a few rows       watermark                detection of lost commits
quota                bytes                          cost                     accounting
labels, predictions  labels; what they belong to    command_log              commands of operators
tables               schema, single values, checksums of rows, errors of SQLite
"""
