"""Which modules a strategy changes: names, patterns, presets, and ranges of layers."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from peftlight.architectures import ARCHITECTURES, Architecture
from peftlight.errors import UserError, listed, nearest
from peftlight.layer_ranges import in_layers
from peftlight.linear import is_linear
from peftlight.paths import at_end, end_of, heads_of, inside, leaf_of, named, own_modules, place_of

T = TypeVar("T")

PRESETS = ("attention", "attention+mlp", "all-linear")
"""What `target_modules` may be besides names and regular expressions."""


@dataclass(frozen=True)
class Selection:
    """The modules that a strategy changes."""

    modules: dict[str, nn.Module]
    """Path to module, in the order of `named_modules()`."""
    matched: dict[str, int]
    """How many modules each name or pattern selected; for a preset, each name that it stands for."""
    notice: str | None
    """What a person should be told about a choice made for them; None: nothing."""


def select(
    model: nn.Module,
    target_modules: str | list[str] | None,
    kinds: tuple[type[nn.Module], ...],
    *,
    exclude_modules: list[str] | None = None,
    layers: str | list[int] | None = None,
    skip: Collection[str] = (),
) -> Selection:
    """The modules of `model` that `target_modules` asks for and that a strategy can change.

    Args:
        model: The model to look through.
        target_modules: Names (a module's path, or the end of one at a dot), each of which must match; or a regular
            expression for the whole path; or a preset: "attention", "attention+mlp", "all-linear". None: what is
            usual for the architecture; where that is unknown, the linear layers of the attention, with a notice.
        kinds: The classes that can be changed. `nn.Linear` stands for GPT-2's `Conv1D` too.
        exclude_modules: Names, as above, of modules to leave alone with all that is inside them.
        layers: Blocks of each stack: "last 4", "first 2", "0-3", "5", or numbers, negative ones from the end.
        skip: Paths of modules that are trained whole; nothing inside them is selected.

    Raises:
        UserError: a name matches nothing that can be changed, `layers` is wrong, or nothing is selected.
    """
    scene = _Scene(model, kinds, skip, exclude_modules or [])
    wanted, notice = _wanted(scene, target_modules)
    found = {name for names in wanted.values() for name in names}
    if not found:
        raise UserError(f"target_modules: {target_modules!r} selects nothing.{scene.inventory()}")
    kept = found if layers is None else in_layers(model, found, layers)
    modules = {name: module for name, module in scene.modules.items() if name in kept}
    matched = {entry: sum(name in modules for name in names) for entry, names in wanted.items()}
    return Selection(modules, matched, notice)


def chosen(model: nn.Module, *arguments: Any, skip: Collection[str] = (), **options: Any) -> dict[str, nn.Module]:
    """What `select` gives, less what is trained whole already; what a person should be told of the choice is logged."""
    selection = select(model, *arguments, skip=[*trained_whole(model), *skip], **options)
    if selection.notice:
        logging.getLogger("peftlight").warning(selection.notice)
    return selection.modules


def matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Paths of the modules, of any kind, that the names in `patterns` match; of two in each other, the outer one.

    Raises:
        UserError: a name matches no module.
    """
    names = [name for name, _ in own_modules(model)]
    found: set[str] = set()
    for pattern in patterns:
        hits = named(names, pattern)
        if not hits:
            ends = dict.fromkeys(end_of(name, pattern.count(".") + 1) for name in names)
            raise UserError(
                f"{pattern!r} matches no module of this {type(model).__name__}.{nearest(pattern, ends)} Expected a "
                f"path, or the end of one at a dot. Its parts are {listed(name for name, _ in model.named_children())}."
            )
        found.update(hits)
    return [name for name in names if name in found and not inside(name.rpartition(".")[0], found)]


def trained_whole(model: nn.Module) -> list[str]:
    """Modules whose weight is already trained: a head takes no LoRA on top."""
    weights = ((name, getattr(module, "weight", None)) for name, module in model.named_modules())
    return [name for name, weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]


def pattern_value(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern, a regular expression, that matches the end of `name` at a dot; or `default`."""
    return next((value for pattern, value in patterns.items() if at_end(pattern, name)), default)


def check_patterns(field: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """See that each pattern of `field` (rank_pattern, say) matches the end of one of the selected `names`.

    Raises:
        UserError: a pattern matches none of them, or is no regular expression.
    """
    for pattern in patterns:
        _check_regex(field, pattern)
        if not any(at_end(pattern, name) for name in names):
            ends = dict.fromkeys(end_of(name, pattern.count(".") + 1) for name in names)
            raise UserError(
                f"{field}: {pattern!r} matches none of the {len(names)} selected modules.{nearest(pattern, ends)} "
                f"They end in {listed(dict.fromkeys(map(leaf_of, names)))}."
            )


class _Scene:
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


_Wanted = tuple[dict[str, list[str]], str | None]
"""The modules of each name, pattern or preset; and the notice."""


def _wanted(scene: _Scene, target: str | Sequence[str] | None) -> _Wanted:
    if target == "all-linear":
        return {"all-linear": scene.linear()}, None
    if target is None or target in PRESETS:
        return _by_table(scene, target) or _by_structure(scene, target)
    if isinstance(target, str) and not re.fullmatch(r"[\w.]+", target):
        hits = {target: _matched_by_regex(scene, target)}
    else:
        hits = {entry: _matched_by_name(scene, entry) for entry in ([target] if isinstance(target, str) else target)}
    if not hits:
        raise UserError(f"target_modules: the list is empty; name at least one module.{scene.inventory()}")
    notice = None
    bypassed = [name for names in hits.values() for name in names if scene.bypassed(name)]
    if bypassed:
        notice = f"Left alone, because the module around them uses their weights directly: {listed(bypassed)}."
    return {entry: _reachable(scene, entry, names) for entry, names in hits.items()}, notice


def _matched_by_name(scene: _Scene, entry: str) -> list[str]:
    hits = named(scene.modules, entry)
    if not hits and entry in PRESETS:
        raise UserError(f"target_modules: {entry!r} is a preset; give it alone, not in a list.")
    if not hits:
        raise UserError(f"target_modules: {entry!r} matches no module.{scene.near(entry)}{scene.inventory()}")
    return hits


def _matched_by_regex(scene: _Scene, pattern: str) -> list[str]:
    _check_regex("target_modules", pattern)
    hits = [name for name in scene.modules if re.fullmatch(pattern, name)]
    if not hits:
        ends = sum(at_end(pattern, name) for name in scene.modules)
        whole = rf"(.*\.)?({pattern})"
        hint = f" It matches the end of {ends} of them: write {whole!r}." if ends else scene.near(pattern)
        raise UserError(
            f"target_modules: the regular expression {pattern!r} matches the whole path of no module.{hint}"
            f"{scene.inventory()}"
        )
    return hits


def _reachable(scene: _Scene, entry: str, hits: list[str]) -> list[str]:
    obstacles = {name: scene.obstacle(name) for name in hits}
    usable = [name for name, obstacle in obstacles.items() if obstacle is None]
    if not usable:
        reasons = dict.fromkeys(obstacles.values())
        raise UserError(
            f"target_modules: {entry!r} matches only what cannot be adapted, {listed(hits, most=2)}: it is "
            f"{'; it is '.join(map(str, reasons))}.{scene.near(entry)}{scene.inventory()}"
        )
    return usable


def _by_table(scene: _Scene, preset: str | None) -> _Wanted | None:
    """What the table of architectures says; None if it does not know the model."""
    model_type, architecture, part = _architecture(scene.model)
    if architecture is None:
        return None
    entries, notices = architecture.default, []
    if preset is not None:
        entries = architecture.attention + (architecture.mlp if preset == "attention+mlp" else ())
    if preset == "attention+mlp" and not architecture.mlp:
        notices.append(
            f"The feed-forward blocks of {model_type!r} are not made of linear layers; they stay as they are."
        )
    if part:
        notices.append(f"Only the text part ({listed(sorted(part))}, a {model_type!r}) is adapted.")
    in_part = [name for name in scene.modules if not part or inside(name, part)]
    if isinstance(entries, str):
        hits = {entries: [name for name in in_part if re.fullmatch(entries, name)]}
    else:
        hits = {entry: named(in_part, entry) for entry in entries}
    if not any(hits.values()):
        return None
    linear = set(scene.linear())
    kept = {entry: [name for name in names if name in linear] for entry, names in hits.items()}
    return {entry: names for entry, names in kept.items() if names}, " ".join(notices) or None


def _architecture(model: nn.Module) -> tuple[str, Architecture | None, set[str]]:
    """Model type, its row of the table, and the paths of the model's text part where the row is only for that."""
    config, nested = getattr(model, "config", None), False
    while config is not None:
        model_type = str(getattr(config, "model_type", ""))
        if model_type in ARCHITECTURES:
            return model_type, ARCHITECTURES[model_type], _of_type(model, model_type) if nested else set()
        inner = (getattr(config, field, None) for field in ("text_config", "llm_config", "thinker_config"))
        config, nested = next((found for found in inner if found is not None), None), True
    return "", None, set()


def _of_type(model: nn.Module, model_type: str) -> set[str]:
    found: set[str] = set()
    for name, module in own_modules(model):
        own_type = getattr(getattr(module, "config", None), "model_type", None)
        if own_type == model_type and not inside(name, found):
            found.add(name)
    return found


def _by_structure(scene: _Scene, preset: str | None) -> _Wanted:
    """Without the table: what sits in attention blocks, and in the repeated blocks around them."""
    linear = scene.linear()
    names, what = [name for name in linear if _in_attention(scene, name)], "the linear layers in attention blocks"
    if preset == "attention+mlp":
        attention = set(names)
        names = [name for name in linear if name in attention or (place_of(name) and "router" not in name)]
        what = "the linear layers in its blocks"
    elif preset is None and not names:
        names, what = linear, "all linear layers except the head"
    wanted: dict[str, list[str]] = {}
    for name in names:
        wanted.setdefault(leaf_of(name), []).append(name)
    model_type = getattr(getattr(scene.model, "config", None), "model_type", None) or type(scene.model).__name__
    notice = (
        f"The names in {str(model_type)!r} are not known, so its structure decided on {what}: "
        f"{listed(f'{leaf} ({len(found)})' for leaf, found in wanted.items())}. To choose yourself, set target_modules "
        f"to names, a regular expression, or one of {', '.join(PRESETS)}."
    )
    return wanted, notice


def _in_attention(scene: _Scene, name: str) -> bool:
    """Whether, from the module outwards, its path speaks of attention before it speaks of a feed-forward block."""
    while name:
        words = f"{name.rpartition('.')[2]} {type(scene.modules[name]).__name__}".lower()
        if re.search("attention|attn", words):
            return True
        if re.search("mlp|feed_?forward|ffn|expert", words):
            return False
        name = name.rpartition(".")[0]
    return False


def _check_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is not a regular expression: {error}.") from None
