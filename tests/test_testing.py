"""The conformance kit finds what it is there to find."""

import pytest

from peftlight.strategies import IA3
from peftlight.testing import check_strategy


def test_a_good_strategy_keeps_every_promise() -> None:
    results = check_strategy(IA3, leave_out=["two processes"])
    assert {result.outcome for result in results} == {"kept"}
