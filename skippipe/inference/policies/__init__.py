"""Policies: which part of a model runs at inference. One file each; `registry` knows them by name."""
