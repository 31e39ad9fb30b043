"""The rollout engine: slots with refill over a KV cache, and sampling."""
