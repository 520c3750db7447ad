"""The longest row of the data."""

from typing import Any


def longest_row(datamodule: Any, *roles: str) -> int:
    """Tokens of the longest row that serves one of the roles; 0 where the data does not say so."""
    summaries = getattr(datamodule, "summaries", None) or {}
    longest = max(getattr(summaries.get(role), "longest", 0) for role in roles)
    return min(longest, getattr(datamodule, "max_length", longest))
