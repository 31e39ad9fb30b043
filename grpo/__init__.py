"""Group-relative policy optimisation (GRPO) for reasoning models, in JAX."""
