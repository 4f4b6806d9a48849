"""A trained model with parts left out: policies, evaluation, generation, several processes."""
