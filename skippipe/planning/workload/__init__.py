"""What one microbatch of an experiment costs, and what the experiment could change to need less memory."""
