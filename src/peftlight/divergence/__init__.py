"""A training that goes wrong is stopped before it does harm, and says which rows, where and why."""

from peftlight.divergence.guard import Guard

__all__ = ["Guard"]
