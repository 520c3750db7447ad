"""The promises of every strategy, one function each; what they have to do with processes is elsewhere."""

import copy
import math
import pickle
import tempfile

import torch
from torch import Tensor, nn

from peftlight.delta import CHILD
from peftlight.errors import UserError, listed
from peftlight.fold_check import WrongFold
from peftlight.interop import load_adapter, save_adapter
from peftlight.pretrained import checkpoint_gradients
from peftlight.strategy import Adapter
from peftlight.testing.training import STEPS, Case, Training
from peftlight.train_mode import put_in_train_mode

NEAR = 1e-5


def starts_as_it_claims(case: Case) -> str | None:
    """Attaching leaves the base's names and values, and its output where `starts_unchanged` says so."""
    model = case.make_model()
    before, output = _values(model), case.output(model)
    adapter = case.prepared(model)
    own = {name: value for name, value in _values(model).items() if CHILD not in name.split(".")}
    assert own.keys() == before.keys(), f"the base's names changed: {listed(own.keys() ^ before.keys())}"
    _assert_equal(own, before, "attaching changed")
    now = case.output(model)
    if not adapter.strategy.starts_unchanged:
        return "starts elsewhere" if _difference(now, output) > 0 else "starts unchanged, though it claims otherwise"
    assert now.shape == output.shape, f"the output has shape {tuple(now.shape)} instead of {tuple(output.shape)}"
    assert _difference(now, output) <= NEAR, (
        f"the output changed by {_difference(now, output):.2g}, yet it claims not to"
    )
    return None


def trains_only_its_own(case: Case) -> str | None:
    """All that trains gets a gradient and moves, nothing else does, the loss falls, and the base stays bit for bit."""
    adapter = case.prepared()
    model, own = adapter.model, adapter.parameters()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(own), f"requires_grad is wrong at {listed(trainable ^ set(own))}"
    before = _values(model)
    training, losses, moved = Training(adapter, case), [], set()
    for step in range(1, STEPS + 1):
        losses += training.run(step, step)
        moved |= {name for name, parameter in own.items() if not torch.equal(parameter, before[name])}
    dead = [name for name, parameter in own.items() if parameter.grad is None]
    assert not dead, f"no gradient: {listed(dead)}"
    stray = [name for name, p in model.named_parameters() if p.grad is not None and name not in own]
    assert not stray, f"a gradient, though frozen: {listed(stray)}"
    assert moved == set(own), f"did not move in {STEPS} steps: {listed(sorted(own.keys() - moved))}"
    frozen: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    kept = adapter.state()  # running statistics too, where the adapter saves them
    frozen |= {name: buffer for name, buffer in model.named_buffers() if CHILD not in name.split(".")}
    _assert_equal(
        {name: value for name, value in frozen.items() if name in before.keys() - kept.keys()},
        before,
        "training changed the frozen",
    )
    assert losses[-1] < losses[0], (
        f"the loss did not fall: {losses[0]:.4g} at first, {losses[-1]:.4g} after {STEPS} steps"
    )
    return None


def comes_off(case: Case) -> str | None:
    """Switched off or removed, the model computes and is what it was."""
    model = case.make_model()
    before, output = _values(model), case.output(model)
    adapter = case.prepared(model)
    Training(adapter, case).run()
    if not adapter.strategy.restorable:
        return "trains the base itself, so it cannot be removed"
    with adapter.disabled():
        assert torch.equal(case.output(model), output), "switched off, the output is not that of the base"
    adapter.remove()
    after = _values(model)
    assert after.keys() == before.keys(), f"removing leaves {listed(after.keys() ^ before.keys())}"
    _assert_equal(after, before, "removing did not restore")
    assert torch.equal(case.output(model), output), "removed, the output is not that of the base"
    return None


def saves_and_loads(case: Case) -> str | None:
    """Files hold everything: a fresh model with them computes what the trained one does."""
    adapter = case.prepared()
    Training(adapter, case).run()
    fresh = case.make_model()
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, folder)
        load_adapter(fresh, folder)
    _assert_near(case.output(fresh), case.output(adapter.model), "loaded from files, the output differs")
    return None


def merges(case: Case) -> str | None:
    """Merged, the bare weights give the same output; unmerged, they are what they were, bit for bit."""
    adapter = case.stirred()
    model = adapter.model
    output = case.output(model)
    before = _values(model)
    try:
        adapter.merge()
    except WrongFold as error:
        raise AssertionError(f"merged, the output differs: {error}") from None
    except UserError as error:
        _assert_equal(_values(model), before, "a merge that was refused changed")
        return f"does not merge: {error}"
    _assert_near(case.output(model), output, "merged, the output differs")
    adapter.unmerge()
    _assert_equal(_values(model), before, "unmerging did not restore")
    assert torch.equal(case.output(model), output), "unmerged, the output differs"
    return None


def resumes(case: Case) -> str | None:
    """Stopped in the middle and taken up by a new process, the training ends with the same bits."""
    whole = Training(case.prepared(), case)
    whole.run()
    first = Training(case.prepared(), case)
    first.run(last=STEPS // 2)
    state = first.state()
    adapter = case.attached()
    adapter.load_state(state["adapter"])
    second = Training(adapter, case)
    second.optimizer.load_state_dict(state["optimizer"])
    second.run(first=STEPS // 2 + 1)
    _assert_equal(adapter.state(), whole.adapter.state(), "resumed, training ended elsewhere:")
    return None


def runs_in_bfloat16(case: Case) -> str | None:
    """On a base in half precision, under autocast, it trains in float32, and all stays finite."""
    halved = Case(case.make_strategy, case.make_model, {key: _halved(value) for key, value in case.inputs.items()})
    adapter = halved.prepared(case.make_model().bfloat16())
    adapter.train_in_float32()
    before = _values(adapter.model)
    losses = Training(adapter, halved, half=True).run(last=3)
    assert all(map(math.isfinite, losses)), f"the loss is not finite: {losses}"
    own = adapter.parameters()
    wrong = [name for name, p in own.items() if p.dtype != torch.float32 or not p.isfinite().all()]
    assert not wrong, f"not finite, or not float32: {listed(wrong)}"
    assert any(not torch.equal(p, before[name]) for name, p in own.items()), "nothing moved"
    return None


def checkpoints_gradients(case: Case) -> str | None:
    """Activations computed again in the backward pass give the same gradients, or are refused by name."""
    plain, again = case.stirred(), case.stirred()
    try:
        checkpoint_gradients(again.model)
    except UserError as error:
        return str(error)
    torch.manual_seed(1)
    put_in_train_mode(plain)
    case.loss(plain.model).backward()
    torch.manual_seed(1)
    try:
        put_in_train_mode(again)
        case.loss(again.model).backward()
    except UserError as error:
        return f"refused: {error}"
    found, expected = _gradients(again), _gradients(plain)
    lacking = sorted(expected.keys() - found.keys())
    assert found.keys() == expected.keys(), f"no gradient with checkpointing: {listed(lacking)}"
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    wrong = [name for name, gradient in expected.items() if (found[name] - gradient).abs().max() > 1e-4 * largest]
    assert not wrong, f"with checkpointing the gradients differ: {listed(wrong)}"
    return None


def copies(case: Case) -> str | None:
    """Deep copies and pickles compute the same, and are independent."""
    adapter = case.stirred()
    output = case.output(adapter.model)
    twin: Adapter = copy.deepcopy(adapter)
    again: Adapter = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(case.output(twin.model), output), "a deep copy computes something else"
    assert torch.equal(case.output(again.model), output), "a pickled copy computes something else"
    Training(twin, case).run(last=2)
    assert torch.equal(case.output(adapter.model), output), "training a copy changed the original"
    assert not torch.equal(case.output(twin.model), output), "training a copy changed nothing in it"
    return None


def compiles(case: Case) -> str | None:
    """Traced by `torch.compile`, the output is the same."""
    adapter = case.stirred()
    output = case.output(adapter.model)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(adapter.model, backend="eager")
    except RuntimeError as error:
        return f"this platform does not compile: {error}"
    _assert_near(case.output(compiled), output, "compiled, the output differs")  # type: ignore[arg-type]
    return None


def _gradients(adapter: Adapter) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in adapter.parameters().items() if parameter.grad is not None}


def _halved(value: Tensor) -> Tensor:
    return value.bfloat16() if value.is_floating_point() else value


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one.double() - other.double()).abs().max()) / max(1.0, float(other.abs().max()))


def _assert_near(one: Tensor, other: Tensor, what: str) -> None:
    assert one.shape == other.shape, f"{what}: shape {tuple(one.shape)}, expected {tuple(other.shape)}"
    assert _difference(one.detach(), other.detach()) <= NEAR, (
        f"{what} by {_difference(one.detach(), other.detach()):.2g}"
    )


def _assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    wrong = [name for name, value in one.items() if name not in other or not torch.equal(value, other[name])]
    assert not wrong, f"{what} {listed(wrong)}"
