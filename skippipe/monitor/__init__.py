"""Metrics, Weights & Biases, and the HTML report."""
