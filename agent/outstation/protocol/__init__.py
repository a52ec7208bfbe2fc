"""The agreement of device and fleet: messages, signatures, transport, alerts; and the client of producers."""
