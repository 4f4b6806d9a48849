"""Text from a model of which a part runs: sampling, self-speculative decoding, counts of FLOP."""
