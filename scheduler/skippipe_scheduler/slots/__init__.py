"""A problem by slot, the form that searches work on: slot costs, solutions, first placements and routes."""
