"""What walks a rank's program: the static and the dynamic executor, emulated links and tasks."""
