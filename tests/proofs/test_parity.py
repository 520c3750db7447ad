"""`peftlight verify parity` and `merge` on strategies of each kind, and on some that break what is proven."""

from pathlib import Path

import pytest

from proofs.small import LANGUAGE, PROOF, SENTENCES, verify

pytestmark = [*PROOF, pytest.mark.usefixtures("forked")]
READ = "read by transformers"


@pytest.mark.parametrize(("strategy", "others"), [
    ("lora", READ), ("pissa", READ), ("ia3", READ), ("dora", "not asked of transformers: it leaves out"),
    ("prefix", "not asked of transformers: it takes no prefixes"), ("mam", "not asked of transformers: the format"),
])  # fmt: skip
def test_what_was_trained_is_saved_and_read(
    strategy: str, others: str, decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify("parity", strategy, decoder, *LANGUAGE, "--steps=3") == 0
    found = capsys.readouterr().out.partition("equal: ")[2].splitlines()
    assert found[0].startswith("loaded from its files, the adapter (it moves scores by ")
    assert found[0].endswith("computes what was trained: bit for bit")
    assert "moves scores by 0 " not in found[0]
    assert found[1] == "  switched off, it leaves what the base computes: bit for bit"
    assert others in found[2]


def test_ranks_that_were_cut_compute_the_same_but_for_rounding(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify("parity", "adalora", encoder, *SENTENCES) == 0
    assert "equal: " in capsys.readouterr().out


def test_without_hf_peft_its_part_is_left_out_and_said(
    encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("peftlight.proofs.parity.find_spec", lambda name: None)
    assert verify("parity", "lora", encoder, *SENTENCES, "--steps=2") == 0
    said = capsys.readouterr().out
    assert "equal: " in said
    assert "it reads adapters by HF PEFT, which is not installed here (pip install peft)" in said


def test_state_that_no_file_holds_is_found(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("parity", "Forgetful", encoder, *SENTENCES, "--steps=3") == 1
    assert "differs: loaded from its files, the adapter" in capsys.readouterr().out


def test_a_merge_gives_its_figures(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("merge", "lora", encoder, *SENTENCES, "--steps=3") == 0
    out = capsys.readouterr().out
    assert "largest difference" in out
    assert "equal: the merged model is within " in out


def test_a_fold_that_is_not_what_is_computed_is_found(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify("merge", "WronglyFolded", encoder, *SENTENCES, "--steps=3") == 1
    assert "differs: The merged model is not written: it does not compute what base and adapter do. At bert." in (
        capsys.readouterr().out
    )
