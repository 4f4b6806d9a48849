"""What a run measures of itself: memory, the time of tasks, and how well the devices are used."""
