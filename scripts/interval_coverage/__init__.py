"""Coverage of the 95 % intervals of bundle comparison, on blocks whose truth is known."""
