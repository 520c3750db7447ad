"""The longest row of the data, and whether the model has positions for it."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from peftlight.errors import UserError
from peftlight.positions import Positions, Side, positions_of
from peftlight.strategy import Adapter

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule

_SIDES: dict[Side, tuple[str, str]] = {
    "rows": ("longest", "max_length"),
    "targets": ("longest_target", "max_target_length"),
}
"""What a summary of the data calls the length of the longest, and the option that cuts it."""
_WHERE = "--data.{0} with fit, validate and test, data.{0} in the YAML of --config with the other commands"


class _Longest(NamedTuple):
    """The longest row of a split, or its longest target."""

    where: str
    tokens: int
    """How many of them are left after the cut."""
    option: str
    """The one that cuts it."""

    def __str__(self) -> str:
        return f"{self.where or 'The longest row'}: {self.tokens:,} tokens within {self.option}"


def longest_row(datamodule: Any, *roles: str) -> int:
    """Tokens of the longest row that serves one of the roles; 0 where the data does not say so."""
    return max((row.tokens for row in _longest(datamodule, "rows", roles)), default=0)


def where_longest(datamodule: Any, role: str) -> str:
    """Where the longest row of the role stands; empty where the data does not say so."""
    return next((row.where for row in _longest(datamodule, "rows", (role,))), "")


def room_for_rows(adapter: Adapter, most: int) -> int:
    """The most tokens of a row, of at most `most`, beside the virtual tokens that the adapter puts before it."""
    least = 0
    while least < most:
        tokens = (least + most + 1) // 2
        try:
            for delta in adapter.sites.values():
                delta.check_length(tokens)
            least = tokens
        except UserError:
            most = tokens - 1
    return least


def check_row_lengths(module: "PEFTModule", model: nn.Module) -> None:
    """See that the model has positions for each row of the data, with the virtual tokens that stand before it.

    Raises:
        UserError: with the longest row, and the option that cuts it. Without it, the model would fail at that row.
    """
    assert module.adapter is not None
    data = module._datamodule()
    known = getattr(data, "summaries", None) or ()
    roles = tuple(role for role in known if not (role == "predict" and module.writes_after_rows))
    for side in _SIDES:
        positions = positions_of(model, side)
        for row in _longest(data, side, roles):
            _check(row, positions, module, side)
            if side == "rows":
                _check_beside_virtual_tokens(module, row)


def check_batch_length(module: "PEFTModule", inputs: Mapping[str, Any]) -> None:
    """See that the model has positions for a batch, of which no data module told before.

    Raises:
        UserError: it has not.
    """
    tokens, most = getattr(inputs.get("input_ids"), "shape", (0, 0))[1], module.positions
    if most is not None and tokens > most:
        raise UserError(
            f"A batch has rows of {tokens:,} tokens, and {module._base_name()} has {most:,} positions: cut the rows."
        )


def _check_beside_virtual_tokens(module: "PEFTModule", row: _Longest) -> None:
    assert module.adapter is not None
    try:
        for delta in module.adapter.sites.values():
            delta.check_length(row.tokens)
    except UserError as error:
        raise UserError(f"{row.where}: {error}" if row.where else str(error)) from None


def _check(row: _Longest, positions: Positions, module: "PEFTModule", side: Side) -> None:
    base, most = module._base_name(), positions.tabled
    if most is not None and row.tokens > most:
        assert module.adapter is not None
        room = room_for_rows(module.adapter, most) if side == "rows" else most
        beside = f", {most - room} of them for what the adapter puts before a row" if room < most else ""
        raise UserError(
            f"{row}, and {base} has {most:,} positions{beside}. Set {row.option} to {room} or less: "
            f"{_WHERE.format(row.option)}."
        )
    if positions.trained is not None and row.tokens > positions.trained:
        rank_zero_warn(f"{row}, and {base} was made for {positions.trained:,}; what it makes of more is uncertain.")


def _longest(datamodule: Any, side: Side, roles: tuple[str, ...]) -> Iterator[_Longest]:
    """Of each role that the data knows its longest row."""
    name, option = _SIDES[side]
    summaries = getattr(datamodule, "summaries", None) or {}
    for summary in (summaries.get(role) for role in roles):
        if tokens := getattr(summary, name, 0):
            cut = min(tokens, getattr(datamodule, option, tokens))
            yield _Longest(getattr(summary, f"{name}_row", ""), cut, option)
