"""Which modules a strategy changes: names, patterns, presets, and ranges of layers."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from peftlight.architectures import ARCHITECTURES, Architecture
from peftlight.candidates import PRESETS, Candidates
from peftlight.coverage import no_layers, share
from peftlight.errors import UserError, listed, nearest
from peftlight.layer_ranges import in_layers
from peftlight.paths import at_end, end_of, inside, leaf_of, named, own_modules, own_parameters, place_of

T = TypeVar("T")


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
    method: str = "This strategy",
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
        method: What the strategy is called in an error.

    Raises:
        UserError: a name matches nothing that can be changed, `layers` is wrong, or nothing is selected.
    """
    candidates = Candidates(model, kinds, skip, exclude_modules or [])
    wanted, notice = _wanted(candidates, target_modules)
    found = {name for names in wanted.values() for name in names}
    if not found:
        raise UserError(f"target_modules: {target_modules!r} selects nothing{_why(candidates, target_modules, method)}")
    kept = found if layers is None else in_layers(model, found, layers)
    modules = {name: module for name, module in candidates.modules.items() if name in kept}
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
    """Modules whose weight, or another matrix, is already trained: a head takes no LoRA on top."""
    return [
        name
        for name, module in model.named_modules()
        if any(
            p.requires_grad and (leaf == "weight" or p.dim() > 1) for leaf, p in module.named_parameters(recurse=False)
        )
    ]


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


_Wanted = tuple[dict[str, list[str]], str | None]
"""The modules of each name, pattern or preset; and the notice."""


def _wanted(candidates: Candidates, target: str | Sequence[str] | None) -> _Wanted:
    if target == "all-linear":
        return {"all-linear": candidates.linear()}, _passed_by(candidates)
    if target is None or target in PRESETS:
        return _by_table(candidates, target) or _by_structure(candidates, target)
    if isinstance(target, str) and not re.fullmatch(r"[\w.]+", target):
        hits = {target: _matched_by_regex(candidates, target)}
    else:
        hits = {
            entry: _matched_by_name(candidates, entry) for entry in ([target] if isinstance(target, str) else target)
        }
    if not hits:
        raise UserError(f"target_modules: the list is empty; name at least one module.{candidates.inventory()}")
    notice = None
    bypassed = [name for names in hits.values() for name in names if candidates.bypassed(name)]
    if bypassed:
        notice = f"Left alone, because the module around them uses their weights directly: {listed(bypassed)}."
    return {entry: _reachable(candidates, entry, names) for entry, names in hits.items()}, notice


def _why(candidates: Candidates, target: str | Sequence[str] | None, method: str) -> str:
    """Why a preset selects nothing, and what does; the end of a sentence, and more."""
    model = type(candidates.model).__name__
    if not (target is None or target in PRESETS) or candidates.has_linear():
        return f".{candidates.inventory()}"
    lack = f", for this {model} has no linear layer outside its head."
    if convolutions := candidates.convolutions():
        return (f"{lack} Leave target_modules out: then its {len(convolutions)} convolutions are adapted; or name some."
                f"{candidates.inventory()}")  # fmt: skip
    if candidates.has_convolutions():
        return (f"{lack} {method} adapts no convolutions. Choose LoRA (init_lora_weights default or gaussian), which "
                "does.")  # fmt: skip
    return f".{candidates.inventory()}"


def _passed_by(candidates: Candidates) -> str | None:
    """What all-linear leaves out though it does a linear layer's work."""
    left = no_layers(candidates.model, candidates.skip)
    if not left:
        return None
    return (
        f"all-linear leaves out weight matrices that are no layers: {share(left, candidates.model)}. To train some of "
        "them whole, name their modules in trained_modules (attach: modules_to_train)."
    )


def _matched_by_name(candidates: Candidates, entry: str) -> list[str]:
    hits = named(candidates.modules, entry)
    if not hits and entry in PRESETS:
        raise UserError(f"target_modules: {entry!r} is a preset; give it alone, not in a list.")
    parameters = named((name for name, _ in own_parameters(candidates.model)), entry)
    if not hits and parameters:
        raise UserError(_is_parameter(candidates, entry, parameters))
    if not hits:
        raise UserError(f"target_modules: {entry!r} matches no module.{candidates.near(entry)}{candidates.inventory()}")
    return hits


def _is_parameter(candidates: Candidates, entry: str, found: Sequence[str]) -> str:
    owner = found[0].rpartition(".")[0]
    if candidates.obstacle(owner) is None:
        return f"target_modules: {entry!r} is the parameter of a layer. Name the layer: {end_of(owner, 1)}"
    shape = tuple(candidates.model.get_parameter(found[0]).shape)
    return (
        f"target_modules: {entry!r} is no layer but a parameter, {found[0]} with the shape {shape}"
        f"{f', and {len(found) - 1} more' if len(found) > 1 else ''}. A delta sits on a layer and changes what that "
        f"computes; no strategy adapts single parameters. To train it whole with its module: trained_modules "
        f"[{end_of(owner, 2)}] (attach: modules_to_train).{candidates.inventory()}"
    )


def _matched_by_regex(candidates: Candidates, pattern: str) -> list[str]:
    _check_regex("target_modules", pattern)
    hits = [name for name in candidates.modules if re.fullmatch(pattern, name)]
    if not hits:
        ends = sum(at_end(pattern, name) for name in candidates.modules)
        whole = rf"(.*\.)?({pattern})"
        hint = f" It matches the end of {ends} of them: write {whole!r}." if ends else candidates.near(pattern)
        raise UserError(
            f"target_modules: the regular expression {pattern!r} matches the whole path of no module.{hint}"
            f"{candidates.inventory()}"
        )
    return hits


def _reachable(candidates: Candidates, entry: str, hits: list[str]) -> list[str]:
    obstacles = {name: candidates.obstacle(name) for name in hits}
    usable = [name for name, obstacle in obstacles.items() if obstacle is None]
    if not usable:
        reasons = dict.fromkeys(obstacles.values())
        raise UserError(
            f"target_modules: {entry!r} matches only what cannot be adapted, {listed(hits, most=2)}: it is "
            f"{'; it is '.join(map(str, reasons))}.{candidates.near(entry)}{candidates.inventory()}"
        )
    return usable


def _by_table(candidates: Candidates, preset: str | None) -> _Wanted | None:
    """What the table of architectures says; None if it does not know the model."""
    model_type, architecture, part = _architecture(candidates.model)
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
    in_part = [name for name in candidates.modules if not part or inside(name, part)]
    if isinstance(entries, str):
        hits = {entries: [name for name in in_part if re.fullmatch(entries, name)]}
    else:
        hits = {entry: named(in_part, entry) for entry in entries}
    if not any(hits.values()):
        return None
    linear = set(candidates.linear())
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


def _by_structure(candidates: Candidates, preset: str | None) -> _Wanted:
    """Without the table: what sits in attention blocks, and in the repeated blocks around them."""
    linear = candidates.linear()
    names, what = [name for name in linear if _in_attention(candidates, name)], "the linear layers in attention blocks"
    if preset == "attention+mlp":
        attention = set(names)
        names = [name for name in linear if name in attention or (place_of(name) and "router" not in name)]
        what = "the linear layers in its blocks"
    elif preset is None and not names:
        names, what = linear, "all linear layers except the head"
        if not names:
            names, what = candidates.convolutions(), "its convolutions, but for those of several groups"
    wanted: dict[str, list[str]] = {}
    for name in names:
        wanted.setdefault(leaf_of(name), []).append(name)
    model_type = (
        getattr(getattr(candidates.model, "config", None), "model_type", None) or type(candidates.model).__name__
    )
    notice = (
        f"The names in {str(model_type)!r} are not known, so its structure decided on {what}: "
        f"{listed(f'{leaf} ({len(found)})' for leaf, found in wanted.items())}. To choose yourself, set target_modules "
        f"to names, a regular expression, or one of {', '.join(PRESETS)}."
    )
    return wanted, notice


def _in_attention(candidates: Candidates, name: str) -> bool:
    """Whether, from the module outwards, its path speaks of attention before it speaks of a feed-forward block."""
    while name:
        words = f"{name.rpartition('.')[2]} {type(candidates.modules[name]).__name__}".lower()
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
