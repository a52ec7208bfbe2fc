"""Tables of the fleet database and their migrations."""
