"""The fleet's TUF repository: what devices may install, signed by keys of which the ones that matter lie elsewhere.

create.py    a new one                        publish.py   a bundle into it          revoke.py   and out of it
rotate.py    another key for a role           roots.py     drafts of the next root   refresh.py  before it expires
status.py    what it holds and what expires   copy.py      onto a stick              address.py   its URL in fleet.toml
edition.py   what clients see now, and how the next one is written

In the words of the TUF specification (1.0.34): root says whose keys count; targets delegates to one role a bundle;
snapshot and timestamp, whose keys are online, say which versions of all these belong together.
"""
