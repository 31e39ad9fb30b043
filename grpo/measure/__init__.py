"""How good a policy is, and what its answers cost."""
