"""To and from the Hugging Face format."""
