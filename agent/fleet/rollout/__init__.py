"""Roll-outs on the fleet's side: a plan, what devices say of each step, and signed decisions that follow from it.

file → plan → decision → desired state → broker ;  shadow and audit messages → rows → verdict → decision

The database is the truth: a decision, the state of its roll-out and what is desired of the devices by it are one
transaction, and are published after it. `tables` has the tables, `plan` the file, `judging` the rules, `acts` what can
be decided, `follow` the loop that decides by itself.
"""
