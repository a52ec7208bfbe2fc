"""How often the 95 % intervals of `rivals` hold the truth, on blocks whose truth is known."""
