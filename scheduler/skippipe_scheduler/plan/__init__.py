"""The plan file, its exact simulation, its validation, and the memory that it needs."""
