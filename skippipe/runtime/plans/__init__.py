"""The plans of one run: which ones its recipe asks for, and which one a step follows. No torch."""
