"""Checkpoints on disk: writing while training goes on, reading under another split; the Hugging Face format."""
