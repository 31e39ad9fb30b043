"""Weights in and out: safetensors, GGUF, adapters."""
