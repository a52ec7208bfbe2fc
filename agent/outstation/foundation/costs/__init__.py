"""Cost estimates: usage of devices in a month, in money, beside raw data sent to a cloud endpoint."""
