"""The sum of a stage's gradients over its replicas, exact or compressed."""
