"""What becomes of a stage that nobody holds any more: each way to go on in a file, and the order of preference."""
