"""A Hugging Face decoder cut into stages: building, compute, memory, what it costs."""
