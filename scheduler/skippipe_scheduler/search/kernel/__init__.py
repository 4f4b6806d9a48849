"""The inner loop of the search, compiled with numba: plain arrays and loops, no objects."""
