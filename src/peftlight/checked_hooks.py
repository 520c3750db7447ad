"""What a strategy's hooks give, seen to be what was asked for: a user's may give anything."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from peftlight.delta import Delta
from peftlight.errors import UserError, listed, nearest


def deltas_of(strategy: Any, model: nn.Module) -> list[tuple[str, Delta]]:
    """The pairs of a module's name and its delta.

    Raises:
        UserError: `deltas` gives something else, a name that the model does not have, or one twice.
    """
    hook = f"{type(strategy).__name__}.deltas"
    pairs = _each(strategy.deltas(model), hook)
    names = dict(model.named_modules(remove_duplicate=False))
    seen: set[str] = set()
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"{hook} gives {_short(pair)}; expected pairs, the name of a module and its delta.")
        site, delta = pair
        if not isinstance(delta, Delta):
            raise UserError(f"{hook} gives a {type(delta).__name__} for {site!r}; expected a peftlight.delta.Delta.")
        if site not in names:
            raise UserError(f"{hook} names {site!r}, and this {type(model).__name__} has no such "
                            f"module.{nearest(site, names)}")  # fmt: skip
        if site in seen:
            raise UserError(f"{hook} gives two deltas for {site!r}; expected one for each module. Put both into one, "
                            "or their strategies into a Stack.")  # fmt: skip
        seen.add(site)
    return [(site, delta) for site, delta in pairs]


def trained_by(strategy: Any, model: nn.Module) -> list[str]:
    """The names of what the strategy trains in place.

    Raises:
        UserError: `train` names what the model does not have.
    """
    hook = f"{type(strategy).__name__}.train"
    names = _each(strategy.train(model), hook)
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known |= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if lost := [name for name in names if name not in known]:
        raise UserError(f"{hook} names {listed(map(repr, lost), 3)}, and this {type(model).__name__} has no such "
                        f"module or parameter.{nearest(str(lost[0]), known)}")  # fmt: skip
    return names


def _each(given: Any, hook: str) -> list[Any]:
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise UserError(f"{hook} gives {_short(given)}; expected any number of them, by `yield` or in a list.")
    return list(given)


def _short(value: object) -> str:
    return repr(value).partition("\n")[0][:80]
