"""Enrolment: keys, certificates and config files of a fleet, and their revocation."""
