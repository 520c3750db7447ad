"""The conformance kit: what every strategy promises, checked on tiny models of several architectures."""

import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlight.errors import UserError, listed
from peftlight.strategy import PEFTStrategy
from peftlight.testing import checks, processes
from peftlight.testing.models import MODELS, inputs_for, make
from peftlight.testing.training import Case
from peftlight.wrappers import seen_through

CHECKS: dict[str, Callable[[Case], str | None]] = {
    "starts as it claims": checks.starts_as_it_claims,
    "trains only its own": checks.trains_only_its_own,
    "comes off": checks.comes_off,
    "saves and loads": checks.saves_and_loads,
    "merges": checks.merges,
    "resumes": checks.resumes,
    "bfloat16": checks.runs_in_bfloat16,
    "gradient checkpointing": checks.checkpoints_gradients,
    "copies": checks.copies,
    "compiles": checks.compiles,
}
"""Each raises AssertionError where the promise is broken; what it returns is a remark."""
PROCESSES = "two processes"
"""The name of the check that starts processes, once for all models."""


@dataclass(frozen=True)
class Result:
    """What became of one check on one model."""

    model: str
    check: str
    outcome: str
    """"kept", "broken", or "refused" where the strategy does not serve the model at all."""
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.model}, {self.check}: {self.outcome}{f' ({self.remark})' if self.remark else ''}"


def check_strategy(
    make_strategy: Callable[[], PEFTStrategy],
    models: Mapping[str, tuple[Callable[[], nn.Module], Mapping[str, Tensor]]] | None = None,
    *,
    leave_out: Iterable[str] = (),
) -> list[Result]:
    """Check a strategy against everything that strategies promise.

    Args:
        make_strategy: the class, or a function that makes a new strategy; importable, for the check that starts
            processes.
        models: a function that makes the model, always the same, and inputs with labels, by a name; none: tiny BERT,
            RoBERTa, Llama, GPT-2, T5 and ViT. A model that the strategy refuses with a `UserError` is left out.
        leave_out: names of checks not to run: those of `CHECKS`, and "two processes".

    Returns:
        One result for each model and check.

    Raises:
        AssertionError: a promise is broken, or no model is served; the message lists everything.
    """
    models = models if models is not None else {name: (Tiny(name), inputs_for(name)) for name in MODELS}
    cases = {name: Case(make_strategy, Plain(make), inputs) for name, (make, inputs) in models.items()}
    wanted = {name: check for name, check in CHECKS.items() if name not in set(leave_out)}
    results = [result for name, case in cases.items() for result in _on_one_model(name, case, wanted)]
    if PROCESSES not in set(leave_out):
        refused = {result.model for result in results if result.outcome == "refused"}
        results += in_two_processes({name: case for name, case in cases.items() if name not in refused})
    broken = [str(result) for result in results if result.outcome == "broken"]
    if broken:
        raise AssertionError(f"{len(broken)} promises are broken:\n  " + "\n  ".join(broken))
    if all(result.outcome == "refused" for result in results):
        raise AssertionError(f"The strategy serves none of the models {listed(cases)}: {results[0].remark}")
    return results


def _on_one_model(name: str, case: Case, wanted: Mapping[str, Callable[[Case], str | None]]) -> list[Result]:
    try:
        case.attached()
    except UserError as error:
        return [Result(name, "attach", "refused", str(error))]
    return [_run(name, title, check, case) for title, check in wanted.items()]


def _run(name: str, title: str, check: Callable[[Case], str | None], case: Case) -> Result:
    try:
        return Result(name, title, "kept", check(case) or "")
    except AssertionError as error:
        return Result(name, title, "broken", str(error))
    except Exception as error:  # whatever the strategy's code raises is its author's news, not the end of the others
        return Result(name, title, "broken", f"{type(error).__name__}: {error}")


def in_two_processes(cases: Mapping[str, Case]) -> list[Result]:
    """The check of all cases with processes: starting them takes longer than the check."""
    if multiprocessing.current_process().name != "MainProcess":
        raise SystemExit("check_strategy starts processes, and they run your script again: put the call under "
                         'if __name__ == "__main__":')  # fmt: skip
    try:
        wrong = processes.wrong_gradients(list(cases.values()))
    except Exception as error:
        return [Result(", ".join(cases), PROCESSES, "broken", f"{type(error).__name__}: {error}")]
    return [
        Result(
            name,
            PROCESSES,
            "broken" if names else "kept",
            f"gradients differ from one process's: {listed(names)}" if names else "",
        )
        for name, names in zip(cases, wrong, strict=True)
    ]


@dataclass(frozen=True)
class Plain:
    """Makes a model as a function does, without the wrapper of `torch.compile`; picklable."""

    make: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        return seen_through(self.make())


@dataclass(frozen=True)
class Tiny:
    """Makes one of our tiny models, with biases and scales that are not zero and one; picklable."""

    name: str

    def __call__(self) -> nn.Module:
        model = make(self.name)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model
