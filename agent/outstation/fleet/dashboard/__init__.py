"""The dashboard: web pages over the fleet database, in a process of their own that reads it only.

What an operator does becomes a decision or a command signed with the operator's key, or is absent from the pages.
"""
