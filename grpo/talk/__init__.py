"""What `grpo.chat` is made of."""
