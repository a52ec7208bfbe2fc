"""RFC 3161 time stamps: a witness outside the operator that dates the heads of all logs."""
