"""Text to tokens to samples of one length, in an order that a run resumes exactly."""
