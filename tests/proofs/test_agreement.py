"""What counts as the same, and how the first difference is told."""

import torch

from peftlight.proofs.agreement import count, first_gap, largest_gap, leaves

NAN = float("nan")


def test_nested_values_are_found_by_their_paths() -> None:
    state = {"state": {0: {"step": torch.tensor(3.0), "beta": (0.9, 0.99)}}, "groups": []}
    assert list(leaves(state)) == ["state.0.step", "state.0.beta.0", "state.0.beta.1"]


def test_the_first_tensor_that_differs_is_named_with_its_furthest_number() -> None:
    one = {"same": torch.ones(2), "A": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "B": torch.zeros(1)}
    other = {"same": torch.ones(2), "A": torch.tensor([[1.0, 2.5], [3.0, 5.0]]), "B": torch.ones(1)}
    gap = first_gap(one, other)
    assert gap is not None
    assert gap.told("here", "there") == "A: 2 of 4 numbers differ, by 1 at most: 4.0 here, 5.0 there"


def test_a_limit_lets_small_differences_pass_and_no_others() -> None:
    one, other = {"A": torch.tensor([1.0, 2.0])}, {"A": torch.tensor([1.0, 2.25])}
    assert first_gap(one, other, limit=0.25) is None
    assert first_gap(one, other, limit=0.2) is not None
    assert largest_gap(one, other) == 0.25


def test_numbers_that_are_none_are_equal_to_themselves_and_to_nothing_else() -> None:
    odd = torch.tensor([NAN, torch.inf, -torch.inf])
    assert first_gap({"A": odd, "b": NAN}, {"A": odd.clone(), "b": NAN}) is None
    for other in (torch.tensor([0.0, torch.inf, -torch.inf]), torch.tensor([NAN, -torch.inf, -torch.inf])):
        assert first_gap({"A": odd}, {"A": other}, limit=1e9) is not None


def test_another_shape_a_dtype_a_missing_name_and_a_plain_value_differ() -> None:
    one = {"A": torch.ones(2)}
    for other in ({"A": torch.ones(1, 2)}, {"A": torch.ones(2).double()}, {}, {**one, "B": torch.ones(1)}):
        assert first_gap(one, other) is not None
    gap = first_gap({"step": 3}, {"step": 4})
    assert gap is not None
    assert gap.told("straight", "resumed") == "step: 3 straight, 4 resumed"


def test_whole_numbers_and_bytes_are_compared_exactly() -> None:
    assert first_gap({"rng": torch.arange(5, dtype=torch.uint8)}, {"rng": torch.arange(5, dtype=torch.uint8)}) is None
    assert first_gap({"n": torch.tensor(2**52)}, {"n": torch.tensor(2**52 + 1)}) is not None
    assert count({"A": torch.ones(2, 3), "b": 1}) == "1 tensors of 6 numbers"
