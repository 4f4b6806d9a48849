"""How messages share the network: what waits for what, which capacities there are, and fair shares of them."""
