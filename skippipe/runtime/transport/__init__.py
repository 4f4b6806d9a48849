"""How one activation gets from one rank to another."""
