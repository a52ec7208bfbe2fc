"""Configuration files: TOML as typed structs, quantities with units, and sections of other packages."""
