"""Which modules a strategy changes: names, patterns, presets, and ranges of layers."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from peftlight.architectures import ARCHITECTURES, Architecture
from peftlight.errors import UserError, listed, nearest
from peftlight.linear import is_linear

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
    kept = found if layers is None else _in_layers(scene, found, layers)
    modules = {name: module for name, module in scene.modules.items() if name in kept}
    matched = {entry: sum(name in modules for name in names) for entry, names in wanted.items()}
    return Selection(modules, matched, notice)


def matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Paths of the modules, of any kind, that the names in `patterns` match; of two in each other, the outer one.

    Raises:
        UserError: a name matches no module.
    """
    names = [name for name, _ in own_modules(model)]
    found: set[str] = set()
    for pattern in patterns:
        hits = _named(names, pattern)
        if not hits:
            ends = dict.fromkeys(_end(name, pattern.count(".") + 1) for name in names)
            raise UserError(
                f"{pattern!r} matches no module of this {type(model).__name__}.{nearest(pattern, ends)} Expected a "
                f"path, or the end of one at a dot. Its parts are {listed(name for name, _ in model.named_children())}."
            )
        found.update(hits)
    return [name for name in names if name in found and not _inside(name.rpartition(".")[0], found)]


def pattern_value(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern, a regular expression, that matches the end of `name` at a dot; or `default`."""
    return next((value for pattern, value in patterns.items() if _at_end(pattern, name)), default)


def check_patterns(field: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """See that each pattern of `field` (rank_pattern, say) matches the end of one of the selected `names`.

    Raises:
        UserError: a pattern matches none of them, or is no regular expression.
    """
    for pattern in patterns:
        _check_regex(field, pattern)
        if not any(_at_end(pattern, name) for name in names):
            ends = dict.fromkeys(_end(name, pattern.count(".") + 1) for name in names)
            raise UserError(
                f"{field}: {pattern!r} matches none of the {len(names)} selected modules.{nearest(pattern, ends)} "
                f"They end in {listed(dict.fromkeys(map(_leaf, names)))}."
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
            hits = _named(self.modules, entry)
            if not hits:
                raise UserError(f"exclude_modules: {entry!r} matches no module.{self.near(entry)}{self.inventory()}")
            self.excluded.update(hits)

    def obstacle(self, name: str) -> str | None:
        """Why a module cannot be selected, to be read after "it is"; None if it can."""
        module = self.modules[name]
        if _inside(name, self.excluded):
            return "left out by exclude_modules"
        if _inside(name, self.skip):
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
        return [name for name in self.usable() if is_linear(self.modules[name]) and not _inside(name, self.heads)]

    def supported(self) -> str:
        return ", ".join(kind.__name__ for kind in self.kinds)

    def near(self, entry: str) -> str:
        depth = entry.count(".") + 1
        ends = [_end(name, depth) if depth > 1 else _leaf(name) for name in self.usable()]
        return nearest(entry, dict.fromkeys([*ends, *PRESETS]))

    def inventory(self) -> str:
        leaves = Counter(map(_leaf, self.usable()))
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
    hits = _named(scene.modules, entry)
    if not hits and entry in PRESETS:
        raise UserError(f"target_modules: {entry!r} is a preset; give it alone, not in a list.")
    if not hits:
        raise UserError(f"target_modules: {entry!r} matches no module.{scene.near(entry)}{scene.inventory()}")
    return hits


def _matched_by_regex(scene: _Scene, pattern: str) -> list[str]:
    _check_regex("target_modules", pattern)
    hits = [name for name in scene.modules if re.fullmatch(pattern, name)]
    if not hits:
        ends = sum(_at_end(pattern, name) for name in scene.modules)
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
    in_part = [name for name in scene.modules if not part or _inside(name, part)]
    if isinstance(entries, str):
        hits = {entries: [name for name in in_part if re.fullmatch(entries, name)]}
    else:
        hits = {entry: _named(in_part, entry) for entry in entries}
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
        if own_type == model_type and not _inside(name, found):
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
        wanted.setdefault(_leaf(name), []).append(name)
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


def _in_layers(scene: _Scene, names: Collection[str], layers: str | list[int]) -> set[str]:
    """Those of the names that lie in the layers asked for, counted in each stack by itself."""
    placed = {name: place for name in names if (place := place_of(name))}
    if not placed:
        raise UserError(f"layers: {layers!r} was given, but what target_modules selects lies in no numbered layer.")
    stacks = dict.fromkeys((stack for stack, _ in placed.values()), 0)
    for stack, index in filter(None, map(place_of, scene.modules)):
        if stack in stacks:
            stacks[stack] = max(stacks[stack], index + 1)
    longest = max(stacks.values())
    counts = listed(f"{stack or 'top'}: {count}" for stack, count in stacks.items())
    has = f"The model has {longest} layers ({counts})."
    wrong = [index for index in _numbers(layers, longest, has) if not 0 <= index < longest]
    if wrong:
        raise UserError(f"layers: {layers!r} reaches beyond the first or last layer. {has} Counting starts at 0.")
    asked = {stack: set(_numbers(layers, count, has)) for stack, count in stacks.items()}
    kept = {name for name, (stack, index) in placed.items() if index in asked[stack]}
    if not kept:
        there = sorted({index for _, index in placed.values()})
        raise UserError(f"layers: {layers!r} leaves nothing: the modules selected lie in layers {listed(there, 24)}.")
    return kept


def _numbers(layers: str | list[int], count: int, has: str) -> Sequence[int]:
    """The layers asked for, in a stack of `count`; they may lie outside it."""
    if isinstance(layers, str):
        if edge := re.fullmatch(r"\s*(last|first)\s+([1-9]\d*)\s*", layers):
            number = int(edge[2])
            return range(number) if edge[1] == "first" else range(count - number, count)
        if span := re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", layers):
            first, last = int(span[1]), int(span[2] or span[1])
            if first <= last:
                return range(first, last + 1)
    elif layers and all(isinstance(index, int) for index in layers):
        return [index if index >= 0 else count + index for index in layers]
    raise UserError(
        f"layers: {layers!r} is not understood. Expected 'last 4', 'first 2', '0-3', '5', or a list of numbers such as "
        f"[0, -1]. {has}"
    )


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below the model, without those that adapters brought along."""
    for name, module in model.named_modules():
        if name and "deltas" not in name.split("."):
            yield name, module


def heads_of(model: nn.Module) -> set[str]:
    """Paths of the output embedding and of what stands outside the backbone, where the model has one."""
    output_embedding = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {name for name, module in model.named_modules() if module is output_embedding}
    backbone, children = getattr(model, "base_model_prefix", None), {name for name, _ in model.named_children()}
    if backbone in children:
        return heads | (children - {backbone})
    # A model of transformers with its parts at the top (CLIP's classifier, say): heads can be told by name alone.
    return heads | (children & {"classifier", "score", "lm_head", "qa_outputs"} if backbone is not None else set())


def _named(names: Iterable[str], entry: str) -> list[str]:
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def _inside(name: str, paths: Collection[str]) -> bool:
    """Whether the name is one of the paths or lies below one."""
    while name and name not in paths:
        name = name.rpartition(".")[0]
    return bool(name)


def place_of(name: str) -> tuple[str, int] | None:
    """The stack that a path goes through and the number of its layer in it, or None."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return None if place is None else (".".join(parts[:place]), int(parts[place]))


def _end(name: str, length: int) -> str:
    return ".".join(name.split(".")[-length:])


def _leaf(name: str) -> str:
    """The last part of a path; the last two where that is a number."""
    last = name.rpartition(".")[2]
    return _end(name, 2) if last.isdecimal() else last


def _at_end(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _check_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is not a regular expression: {error}.") from None
