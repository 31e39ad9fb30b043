"""Training stages other than reinforcement learning."""
