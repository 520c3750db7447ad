"""Text that a model writes: prompts from anywhere, batches, sampling, and a conversation."""
