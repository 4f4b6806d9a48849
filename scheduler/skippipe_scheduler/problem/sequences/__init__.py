"""The sequences of stages that obey the rules: all of them, a sample, or as many as there are microbatches."""
