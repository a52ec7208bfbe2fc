"""The store: one SQLite file, one connection that writes, one transaction at a time.

store        open, read, `transaction()`                 schema     tables, pragmas, longer statements
transaction  what can be written in one                  rows       columns of readings, packing, validation
outbox       messages that wait or are kept a while      retention  which are acknowledged, and for how long they stay
segments     of the wall clock, where rows were stamped  ranges     sets of numbers as ranges
quota        who may take how much                       space      what goes when it runs short
eviction     what goes is declared                       forecast   how long until something must go
checked, setaside  messages that the disk has changed    categories  category texts after damage
"""
