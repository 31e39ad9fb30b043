"""Other GRPO trainers, given the same work and timed."""
