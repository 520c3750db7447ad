"""The arguments of `peftlight verify`, what it leaves behind, and its exit codes; what it proves is in tests/proofs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from peftlight.cli import main
from peftlight.errors import UserError
from peftlight.proofs import resume
from peftlight.proofs.agreement import Outcome
from peftlight.proofs.trainings import Bench

A_YAML = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
Calls = list[tuple[list[str], Path, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Calls]:
    """Lets the proof of resuming come out as it is told to, and says how it was called."""

    def answer(holds: bool) -> Calls:
        calls: Calls = []

        def prove(bench: Bench, steps: int) -> Outcome:
            assert bench.folder.is_dir()
            (bench.folder / "written").touch()
            calls.append((list(bench.given), bench.folder, steps))
            return Outcome(holds, "4 tensors")

        monkeypatch.setattr(resume, "prove_resume", prove)
        return calls

    return answer


def test_the_options_of_fit_go_to_the_trainings_and_its_own_to_itself(
    asked: Callable[[bool], Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = asked(True)
    ours = ["--steps", "3", "--keep=null"]
    of_fit = ["--config", A_YAML, "--data.source", "-1", "--model.strategy.rank=4", "--trainer.devices", "2"]
    assert main(["verify", "resume", *of_fit[:2], *ours, *of_fit[2:]]) == 0
    ((given, folder, steps),) = calls
    assert given == of_fit
    assert steps == 3
    assert not folder.exists()
    assert capsys.readouterr().out == "equal: 4 tensors\n"


def test_a_proof_that_does_not_hold_has_exit_code_1(
    asked: Callable[[bool], Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    asked(False)
    assert main(["verify", "resume", "--config", A_YAML]) == 1
    assert capsys.readouterr().out == "differs: 4 tensors\n"


def test_what_the_trainings_write_is_kept_where_it_is_asked_for(asked: Callable[[bool], Calls], tmp_path: Path) -> None:
    asked(True)
    assert main(["verify", "resume", "--keep", str(tmp_path / "new"), "--config", A_YAML]) == 0
    assert (tmp_path / "new" / "written").exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (["resume", "--steps", "0"], "--steps is a number of optimizer steps, at least 1; it is 0."),
    (["resume", "--steps", "2"], "--steps is 2: resuming is proven within an epoch and after one"),
    (["ddp", "--devices", "1"], "--devices is 1: there have to be at least 2 processes"),
    (["resume", "--keep", "."], "--keep . is there already; expected the name of a new folder."),
    (["parity", "--config", "nowhere.yaml"], "nowhere.yaml"),
])  # fmt: skip
def test_what_cannot_be_proven_is_an_error_of_the_users(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments, "--data.batch_size=2"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("peftlight: error:") == 1


def test_trainings_are_made_on_one_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import subprocess

    from peftlight.proofs import trainings

    asked: list[str] = []
    done = subprocess.CompletedProcess([], 2, "", "")
    monkeypatch.setattr(trainings, "peftlight", lambda words: asked.extend(words) or done)
    with pytest.raises(UserError):
        Bench(["--trainer.num_nodes=4"], tmp_path).train("here", 2)
    assert [word for word in asked if "num_nodes" in word][-1] == "--trainer.num_nodes=1"


def test_a_training_that_fails_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import subprocess

    from peftlight.proofs import trainings

    ends = {1: "unexpected error: ValueError: no", 2: "error: model.rank is 0", -11: "..."}
    for code, text in ends.items():
        done = subprocess.CompletedProcess([], code, "", f"peftlight: {text}\n")
        monkeypatch.setattr(trainings, "peftlight", lambda words, done=done: done)
        expected: type[Exception] = UserError if code == 2 else RuntimeError
        with pytest.raises(expected, match=r"^model.rank is 0$|exit code 1: .*ValueError: no$|was killed by SIGSEGV"):
            Bench([], tmp_path).train(f"ends with {code}", 2)
