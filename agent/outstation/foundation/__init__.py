"""Ground of all other rooms: errors, clock, durable files, text, decoders, TOML, plots, commands."""
