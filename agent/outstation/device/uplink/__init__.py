"""Uplink: outbox to sink, acknowledgements and operators' messages back."""
