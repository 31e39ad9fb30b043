"""Rule-based rewards: plain functions from a completion's text to a score, and their pool.

This package stands alone: it imports neither jax nor grpo.
"""
