"""Layers and feed-forward blocks that training leaves out inside a stage."""
