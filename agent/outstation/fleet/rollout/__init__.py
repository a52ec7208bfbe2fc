"""Fleet-side roll-outs: a plan, evidence from devices, and signed decisions.

file → plan → decision → desired state → broker ;  shadow and audit messages → rows → verdict → decision

The database is the source of truth. A decision, the new state of its roll-out and the desired state are one
transaction; publishing follows. `plan` reads the file, `promotion` holds the rules, `actions` the decisions an operator
can make, and `controller` the loop that decides by the rules alone.
"""
