"""The versions that are asked for and pinned: none with a known hole, none that nobody tried, nothing left open."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from requirements import as_pinned, direct, extras, needed, pinned, pins, plain

SOURCE = Path(__file__).parents[1] / "src" / "peftlight"
KNOWN_HOLES = {
    "lightning": [
        "2.6.2", "2.6.3",  # malicious uploads
        "2.6.1", "2.6.4", "2.6.5",  # load_from_checkpoint runs code that a checkpoint names
    ],
    "torch": ["2.5.1", "2.9.1"],  # weights_only can be broken out of
}  # fmt: skip
REACHED_INTO = {
    "torch": "torch.distributed's default store, FSDP's groups of parameters, torch._foreach",
    "lightning": "the loops' counters and loaders, the end of a fit",
    "transformers": "the attention's function, quantizers",
    "bitsandbytes": "the layers' states",
    "jsonargparse": "the wording of its errors",
}
"""Whose next minor version may break what is used behind the public side."""


def test_everything_that_a_full_install_brings_is_pinned() -> None:
    if not as_pinned(one.name for one in direct()):
        pytest.skip("other versions than those of constraints.txt are installed, and may bring others")
    there = needed(direct())
    assert len(there) > 60
    assert sorted(name for name in there if pinned(name) is None) == []


@pytest.mark.parametrize("one", direct(), ids=lambda one: one.name)
def test_a_pin_is_what_the_project_asks_for(one) -> None:
    name = canonicalize_name(one.name)
    assert any(bound.operator == ">=" for bound in one.specifier), "it has no floor"
    assert [str(pin) for pin in pins()[name] if not all(map(one.specifier.contains, _versions(pin)))] == []


def _versions(pin) -> list[str]:
    assert [bound.operator for bound in pin.specifier] == ["=="]
    return [bound.version for bound in pin.specifier]


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, many in KNOWN_HOLES.items() for bad in many])
def test_no_version_with_a_known_hole_can_be_installed(name: str, bad: str) -> None:
    (asked,) = (one for one in plain() if one.name == name)
    assert not asked.specifier.contains(bad)


@pytest.mark.parametrize("name", REACHED_INTO)
def test_what_is_reached_into_is_bounded_at_its_next_minor(name: str) -> None:
    (asked,) = (one for one in plain() if one.name == name)
    major, minor, *_ = Version(max((_versions(pin)[0] for pin in pins()[name]), key=Version)).release
    assert asked.specifier.contains(f"{major}.{minor}.99")
    assert not asked.specifier.contains(f"{major}.{minor + 1}.0")


def test_who_imports_private_names_is_bounded() -> None:
    assert {root for root, private in _imports() if private} <= REACHED_INTO.keys()


def test_every_package_that_is_imported_is_asked_for() -> None:
    """What another package happens to bring goes away with it."""
    of = {root: {canonicalize_name(name) for name in names} for root, names in packages_distributions().items()}
    asked = {canonicalize_name(one.name) for one in [*plain(), *(one for each in extras().values() for one in each)]}
    roots = {root for root, _ in _imports()} - sys.stdlib_module_names - {"peftlight"}
    assert sorted(root for root in roots if not of.get(root, {root}) & asked) == []
    of_dev = {canonicalize_name(one.name) for one in extras()["dev"]}
    assert sorted(root for root in roots if of.get(root, {root}) <= of_dev) == []


def _imports() -> set[tuple[str, bool]]:
    """The roots of all imports in the source, and whether a private name is among them."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found |= {(name.partition(".")[0], any(_is_private(part) for part in name.split("."))) for name in names}
    return {(root, private and root not in (*sys.stdlib_module_names, "peftlight")) for root, private in found}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
