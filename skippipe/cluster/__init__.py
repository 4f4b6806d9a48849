"""Measuring nodes and links: what `skippipe profile` does."""
