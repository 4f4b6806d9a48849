"""Linear layers in training: what else they can do than one product and its backward."""
