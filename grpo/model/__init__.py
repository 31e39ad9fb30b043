"""The decoder: its shape, its parameters, its two forms, and how weights come in."""
