"""For authors of strategies: `check_strategy(MyStrategy)` says whether a new method keeps every promise."""

from peftlight.testing.conformance import Result, check_strategy

__all__ = ["Result", "check_strategy"]
