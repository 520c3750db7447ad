"""What HF PEFT's files put before the names that a tensor's module has in the base."""

PREFIX = "base_model.model."
SHORT_PREFIX = "base_model."
"""In files of prompt learning: one `model.` less."""


def without_prefix(key: str) -> str:
    """A tensor's name without what stands before the base's own names."""
    return next((key.removeprefix(prefix) for prefix in (PREFIX, SHORT_PREFIX) if key.startswith(prefix)), key)
