"""Perplexity and tasks of lm-eval against the share of a model that runs."""
