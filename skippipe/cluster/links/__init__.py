"""Measuring links: what messages and streams take between two ranks, all pairs in rounds, and the pairs left out."""
