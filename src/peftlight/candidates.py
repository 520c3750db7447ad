"""What of a model a strategy may change, and the reason why the rest may not."""

from collections import Counter
from collections.abc import Collection, Sequence

from torch import nn

from peftlight.errors import UserError, listed, nearest
from peftlight.linear import is_linear
from peftlight.paths import end_of, heads_of, inside, leaf_of, named, own_modules

PRESETS = ("attention", "attention+mlp", "all-linear")
"""What `target_modules` may be besides names and regular expressions."""


class Candidates:
    """A model, what may be changed in it, and the reason why the rest may not."""

    def __init__(
        self, model: nn.Module, kinds: tuple[type[nn.Module], ...], skip: Collection[str], exclude: Sequence[str]
    ) -> None:
        self.model = model
        self.kinds = kinds
        self.modules = dict(own_modules(model))
        self.skip = set(skip)
        self.excluded: set[str] = set()
        self.heads = heads_of(model)
        for entry in exclude:
            hits = named(self.modules, entry)
            if not hits:
                raise UserError(f"exclude_modules: {entry!r} matches no module.{self.near(entry)}{self.inventory()}")
            self.excluded.update(hits)

    def obstacle(self, name: str) -> str | None:
        """Why a module cannot be selected, to be read after "it is"; None if it can."""
        module = self.modules[name]
        if inside(name, self.excluded):
            return "left out by exclude_modules"
        if inside(name, self.skip):
            return "trained whole, so it takes no adapter"
        if not (isinstance(module, self.kinds) or (nn.Linear in self.kinds and is_linear(module))):
            return f"a {type(module).__name__}; the kinds supported here are {self.supported()}"
        if isinstance(module, nn.Conv1d | nn.Conv2d) and _computes_otherwise(module):
            return f"a {type(module).__name__}, which does not convolve with its weight as it is"
        if self.bypassed(name):
            parent = type(self.modules[name.rpartition(".")[0]]).__name__
            return f"part of {parent}, which uses the weight directly, so that an adapter would do nothing"
        return None

    def bypassed(self, name: str) -> bool:
        """Whether the module around it reads its weight and never calls it, at least in a fused kernel."""
        path, _, leaf = name.rpartition(".")
        parent = self.modules.get(path)
        mamba = hasattr(parent, "A_log") and hasattr(parent, "D") and leaf in ("x_proj", "dt_proj", "out_proj")
        return mamba or isinstance(parent, nn.MultiheadAttention)

    def usable(self) -> list[str]:
        return [name for name in self.modules if self.obstacle(name) is None]

    def linear(self) -> list[str]:
        """The linear layers that a preset may choose: those outside the heads."""
        return [name for name in self.usable() if is_linear(self.modules[name]) and not inside(name, self.heads)]

    def convolutions(self) -> list[str]:
        """The convolutions that a choice made for the user takes: not those of several groups, which do not merge."""
        return [name for name in self.usable() if self._convolves(name) and self.modules[name].groups == 1]

    def has_linear(self) -> bool:
        """Whether the model has a linear layer outside its heads at all."""
        return any(is_linear(module) and not inside(name, self.heads) for name, module in self.modules.items())

    def has_convolutions(self) -> bool:
        """Whether the model has a convolution outside its heads, of whatever kind can be changed."""
        return any(self._convolves(name) for name in self.modules)

    def _convolves(self, name: str) -> bool:
        return isinstance(self.modules[name], nn.Conv1d | nn.Conv2d) and not inside(name, self.heads)

    def supported(self) -> str:
        return ", ".join(kind.__name__ for kind in self.kinds)

    def near(self, entry: str) -> str:
        depth = entry.count(".") + 1
        ends = [end_of(name, depth) if depth > 1 else leaf_of(name) for name in self.usable()]
        return nearest(entry, dict.fromkeys([*ends, *PRESETS]))

    def inventory(self) -> str:
        leaves = Counter(map(leaf_of, self.usable()))
        if not leaves:
            return f" This {type(self.model).__name__} has no module of a supported kind ({self.supported()})."
        return f" Adaptable names in this model: {listed((f'{leaf} ({n})' for leaf, n in leaves.items()), most=16)}."


def _computes_otherwise(module: nn.Module) -> bool:
    """Whether a convolution's class has a forward of its own: one that standardises its weight first, or pads anew."""
    own, plain = type(module), nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    return own.forward is not plain.forward or own._conv_forward is not plain._conv_forward  # type: ignore[attr-defined]
