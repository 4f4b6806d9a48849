"""Instruction lists for all ranks, compiled from a plan and proved before anything runs. No torch."""
