"""`peftlight diff`: two adapters compared, against angles and distances of the folded weights computed here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.test_combine import base, on, read, saved  # noqa: F401  # base is a fixture
from commands.trained import COMMAND_LINE, gpt2_in
from peftlight.cli import main
from peftlight.strategies import IA3, BitFit, LoRA, PrefixTuning
from peftlight.strategy import PEFTStrategy

pytestmark = COMMAND_LINE


def figures(one: str, two: str, tmp_path: Path, *options: str) -> Any:
    assert main(["diff", "--traceback", one, two, f"--json={tmp_path / 'figures.json'}", *options]) == 0
    return json.loads((tmp_path / "figures.json").read_text())


def changes(base: Path, folder: str) -> dict[str, torch.Tensor]:  # noqa: F811
    adapter = read(base, Path(folder))
    names = [f"{site}.weight" for site in adapter.sites]
    before = {name: adapter.model.get_parameter(name).detach().double() for name in names}
    adapter.merge()
    return {name: (adapter.model.get_parameter(name).detach().double() - before[name]).T for name in names}


def pair(base: Path, tmp_path: Path, one: PEFTStrategy, two: PEFTStrategy) -> tuple[str, str]:  # noqa: F811
    return saved(on(base, one, 1), base, tmp_path / "one"), saved(on(base, two, 2), base, tmp_path / "two")


@pytest.mark.parametrize("directions", [2, 8])
def test_the_figures_are_those_of_the_folded_weights(base: Path, tmp_path: Path, directions: int) -> None:  # noqa: F811
    first, second = LoRA(rank=3, target_modules=["c_attn", "c_proj"]), LoRA(rank=5, target_modules=["c_attn"])
    one, two = pair(base, tmp_path, first, second)
    found = figures(one, two, tmp_path, f"--directions={directions}")
    here, there = changes(base, one), changes(base, two)
    rows = {row["name"]: row for row in found["common"]}
    assert rows.keys() == here.keys() & there.keys()
    assert found["only"] == [[name for name in here if name not in there], []]
    for name, row in rows.items():
        a, b = here[name], there[name]
        assert row["cosine"] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-5)
        distance = (a - b).norm() / ((a.norm() ** 2 + b.norm() ** 2) / 2).sqrt()
        assert row["distance"] == pytest.approx(float(distance), rel=1e-5)
        for part, turned in (("outputs", False), ("inputs", True)):
            ours, theirs = (torch.linalg.svd(x.T if turned else x)[0] for x in (a, b))
            i, j = min(directions, 3), min(directions, 5)
            # By the projection on the other space, whose eigenvalues on this one are the squared cosines.
            projection = theirs[:, :j] @ theirs[:, :j].T
            squares = torch.linalg.eigvalsh(ours[:, :i].T @ projection @ ours[:, :i]).clamp(min=0).sqrt()
            angles = sorted(squares.arccos().rad2deg().tolist())[: min(i, j)]
            assert row[part]["degrees"] == pytest.approx(angles, rel=1e-3)
            overlap = float((ours[:, :i].T @ theirs[:, :j]).norm() ** 2) / min(i, j)
            assert row[part]["similarity"] == pytest.approx(overlap, rel=1e-3)
            assert row[part]["by_chance"] == pytest.approx(max(i, j) / len(ours))
    assert found["settings"]["rank"] == [3, 5]
    assert "alpha" not in found["settings"]


def test_an_adapter_does_not_differ_from_itself(base: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = saved(on(base, LoRA(rank=3, bias="all"), 1), base, tmp_path / "a")
    found = figures(folder, f"again={folder}", tmp_path)
    assert found["settings"] == {}
    assert found["only"] == [[], []]
    assert any(row["outputs"] is None for row in found["common"])
    for row in found["common"]:
        assert row["cosine"] == pytest.approx(1)
        assert row["distance"] == pytest.approx(0, abs=1e-6)
        if row["outputs"]:
            assert row["outputs"]["similarity"] == pytest.approx(1)
            assert row["inputs"]["degrees"] == pytest.approx([0, 0, 0], abs=1e-4)


def test_methods_of_other_kinds_are_compared_where_they_meet(
    base: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = pair(base, tmp_path, LoRA(rank=2, bias="all"), BitFit())
    found = figures(one, two, tmp_path, f"--picture={tmp_path / 'a.png'}")
    assert all(row["name"].endswith("bias") for row in found["common"])
    assert found["settings"]["method"] == ["LoRA", "BitFit"]
    said = capsys.readouterr().out
    assert "only one changes, or in another shape: transformer.h.*.attn.c_attn (2)" in said
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    prefixes = pair(base, tmp_path / "more", PrefixTuning(num_virtual_tokens=3), PrefixTuning(num_virtual_tokens=3))
    assert len(figures(*prefixes, tmp_path)["common"]) == 4
    assert figures(prefixes[0], two, tmp_path)["common"] == []


def test_what_does_not_fit_is_refused(
    base: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = pair(base, tmp_path, LoRA(rank=2), IA3())
    other_base = gpt2_in(tmp_path / "other")
    other = saved(on(other_base, LoRA(rank=2), 1), other_base, tmp_path / "three")
    for words, message in (
        ([one, one], "Two adapters would be called 'one'"),
        ([one, other], "do not have the same base"),
        ([one], "TWO"),
        ([one, two, "--directions=0"], "--directions is a number from 1 up"),
        ([one, two, f"--picture={tmp_path / 'no' / 'a.png' / 'b'}", "--pictur=x"], "Did you mean '--picture'"),
    ):
        assert main(["diff", *words]) == 2
        assert message in capsys.readouterr().err
