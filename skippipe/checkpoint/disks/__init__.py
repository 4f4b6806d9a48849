"""Checkpoints of hosts that share no disk: every part on two of them, brought to where it is needed."""
