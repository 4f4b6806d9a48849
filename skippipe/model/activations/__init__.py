"""What a microbatch keeps between its forward and its backward: how much, and what is computed again instead."""
