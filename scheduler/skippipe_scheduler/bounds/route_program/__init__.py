"""The bound from the routes of all origins together: a linear program over all legal routes."""
