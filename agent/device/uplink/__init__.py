"""Messages on their way out, and what comes back.

uplink    connects, and comes back                  session   what goes when on one connection
acknowledge  what may leave the outbox              refusals  what came and was not obeyed
"""
