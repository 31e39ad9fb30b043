"""Problems, where they come from and in which order; tokenizers; prompts."""
