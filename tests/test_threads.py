"""Two threads, or two tasks, on one model: each gets the right result, or an error that says why not."""

import asyncio
import copy
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import attach
from peftlight.adapters import Adapters
from peftlight.errors import UserError
from peftlight.quantization import Quantization
from peftlight.strategies import BitFit, BottleneckAdapter, LoRA, PrefixTuning
from strategies.small import stirred

SECONDS = 0.5
"""Within which a thread that need not wait has done its part; and for which one that has to is waited for in vain."""
LIMIT = 60.0


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**{key: value for key, value in inputs_for("bert").items() if key != "labels"}).logits
    return found


@pytest.fixture
def adapters() -> Adapters:
    """ "a" and "b" with heads of their own; none in use."""
    model = make("bert").eval()
    made = Adapters(model)
    for number, name in enumerate("ab", 1):
        made.attach(LoRA(rank=2), name, modules_to_train=["classifier"])
        made.use(name)
        stirred(made[name], 0.2 * number)
    made.use()
    return made


@pytest.fixture
def alone(adapters: Adapters) -> dict[str | None, Tensor]:
    """What is computed with each, by one thread; none has chosen anything afterwards."""
    found: dict[str | None, Tensor] = {}

    def compute() -> None:
        for name in ("a", "b", None):
            adapters.use(name)
            found[name] = logits(adapters.model)

    in_thread(compute).result(LIMIT)
    assert not torch.allclose(found["a"], found["b"])
    return found


def in_thread(what: Callable[[], Any]) -> Future[Any]:
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(what())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="other", daemon=True).start()
    return done


@contextmanager
def in_the_middle(model: nn.Module, compute: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Within the block another thread is halfway through a computation with the model."""
    reached, goes_on = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        if threading.current_thread().name == "other":
            reached.set()
            assert goes_on.wait(LIMIT)

    hook = model.get_submodule("bert.encoder.layer.1").register_forward_pre_hook(stop)
    try:
        future = in_thread(compute)
        assert reached.wait(LIMIT)
        yield future
    finally:
        goes_on.set()
        hook.remove()


SWITCHES: dict[str, Callable[[Adapters], Any]] = {
    "use": lambda adapters: adapters.use("b"),
    "using": lambda adapters: adapters.using("b").__enter__(),
    "rows": lambda adapters: adapters.rows(["b"] * 4).__enter__(),
    "enable": lambda adapters: adapters["b"].enable(),
    "disable": lambda adapters: adapters["a"].disable(),
    "disabled": lambda adapters: adapters["a"].disabled().__enter__(),
    "merge": lambda adapters: adapters["a"].merge(),
    "load_state": lambda adapters: adapters["a"].load_state(adapters["a"].state()),
    "delete": lambda adapters: adapters.delete("a"),
    "attach": lambda adapters: adapters.attach(BitFit(), "c"),
    "combine": lambda adapters: adapters.combine(["a", "b"], heads_from="a"),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_nothing_is_switched_under_a_thread_that_computes(adapters: Adapters, alone: Any, switch: str) -> None:
    adapters.use("a")
    with (
        in_the_middle(adapters.model, lambda: logits(adapters.model)) as other,
        pytest.raises(UserError, match="The thread 'other' computes with this BertForSequenceClassification right now"),
    ):
        SWITCHES[switch](adapters)
    assert torch.equal(other.result(LIMIT), alone["a"])
    assert torch.equal(logits(adapters.model), alone["a"])
    assert adapters.in_use == ["a"]
    assert adapters.names == ["a", "b"]


def test_nothing_is_switched_between_the_steps_of_a_generation() -> None:
    model = make("gpt2").eval()
    adapters = Adapters(model)
    adapters.attach(LoRA(rank=2), "a")
    stirred(adapters["a"], 0.5)
    ids = inputs_for("gpt2")["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    errors = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            if value.numel() == 1:  # a step is over, and the next has not begun
                try:
                    in_thread(lambda: adapters.use("a")).result(LIMIT)
                except UserError as error:
                    errors.append(str(error))

        def end(self) -> None: ...

    found = model.generate(ids[:1], max_new_tokens=5, do_sample=False, streamer=Streamer())
    assert torch.equal(found, expected[:1])
    assert len(errors) == 5
    assert "right now" in errors[0]


def test_rows_of_two_threads_wait_for_each_other(adapters: Adapters, alone: Any) -> None:
    inside, second_done = threading.Event(), threading.Event()

    def first() -> Tensor:
        with adapters.rows(["a", None, "a", "b"]):
            inside.set()
            assert not second_done.wait(SECONDS)
            return logits(adapters.model)

    def second() -> Tensor:
        assert inside.wait(LIMIT)
        with adapters.rows(["b", "b", None, "a"]):
            found = logits(adapters.model)
        second_done.set()
        return found

    one, two = in_thread(first), in_thread(second)
    for future, names in ((one, ["a", None, "a", "b"]), (two, ["b", "b", None, "a"])):
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(future.result(LIMIT), expected, rtol=1e-5, atol=1e-5)


def test_many_calls_of_several_threads_are_all_right(adapters: Adapters, alone: Any) -> None:
    def some(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(15):
            names = choose.choices(["a", "b", None], k=4)
            if seed % 2:
                with adapters.using(names[0]):
                    assert torch.equal(logits(adapters.model), alone[names[0]])
            else:
                with adapters.rows(names):
                    found = logits(adapters.model)
                expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(4)))
    assert adapters.in_use == []
    assert torch.equal(logits(adapters.model), alone[None])


@pytest.mark.parametrize("block", ["rows", "using", "disabled"])
@pytest.mark.parametrize("part", ["", "bert"])
def test_what_another_thread_computes_within_a_block_is_refused(
    adapters: Adapters, alone: Any, block: str, part: str
) -> None:
    adapters.use("a")
    blocks = {"rows": lambda: adapters.rows(["a"] * 4), "using": lambda: adapters.using("b"),
              "disabled": lambda: adapters["a"].disabled()}  # fmt: skip
    ids = inputs_for("bert")["input_ids"]
    with blocks[block](), pytest.raises(UserError, match="was called by the thread 'other' while the thread"):
        in_thread(lambda: adapters.model.get_submodule(part)(ids)).result(LIMIT)
    assert torch.equal(in_thread(lambda: logits(adapters.model)).result(LIMIT), alone["a"])


def test_a_layer_that_another_thread_calls_within_rows_is_refused(adapters: Adapters) -> None:
    layer = adapters.model.get_submodule("bert.encoder.layer.0.attention.self.query")
    with adapters.rows(["a"] * 4), pytest.raises(UserError, match="called by another thread than the one whose rows"):
        in_thread(lambda: layer(torch.ones(4, 3, 32))).result(LIMIT)


def test_what_a_thread_has_chosen_is_what_it_computes_with_or_an_error(adapters: Adapters, alone: Any) -> None:
    adapters.use("a")
    assert torch.equal(in_thread(lambda: logits(adapters.model)).result(LIMIT), alone["a"])  # it has chosen nothing
    in_thread(lambda: adapters.use("b")).result(LIMIT)
    with pytest.raises(UserError, match="were chosen by the thread 'MainThread', and another thread has switched"):
        logits(adapters.model)
    assert torch.equal(in_thread(lambda: logits(adapters.model)).result(LIMIT), alone["b"])
    with adapters.using("a"):
        assert torch.equal(logits(adapters.model), alone["a"])
    adapters.use("a")
    assert torch.equal(logits(adapters.model), alone["a"])
    in_thread(lambda: adapters.attach(BitFit(), "c")).result(LIMIT)  # what is in use stays
    assert torch.equal(logits(adapters.model), alone["a"])
    twin = copy.deepcopy(adapters.model)
    in_thread(lambda: adapters.use("b")).result(LIMIT)
    assert torch.equal(logits(twin), alone["a"])


def test_threads_with_a_lock_of_their_own_may_use_and_compute(adapters: Adapters, alone: Any) -> None:
    lock = threading.Lock()

    def some(name: str) -> None:
        for _ in range(10):
            with lock:
                adapters.use(name)
                assert torch.equal(logits(adapters.model), alone[name])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(some, ["a", "b"]))


def test_two_tasks_of_one_thread_are_told_apart(adapters: Adapters, alone: Any) -> None:
    async def first(inside: asyncio.Event, goes_on: asyncio.Event) -> Tensor:
        with adapters.using("a"):
            inside.set()
            await goes_on.wait()
            return logits(adapters.model)

    async def both() -> tuple[Tensor, str, str]:
        inside, goes_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(first(inside, goes_on))
        await inside.wait()
        errors = []
        for attempt in (lambda: adapters.use("b"), lambda: logits(adapters.model)):
            with pytest.raises(UserError) as caught:
                attempt()
            errors.append(str(caught.value))
        goes_on.set()
        return await task, errors[0], errors[1]

    found, switched, computed = asyncio.run(both())
    assert torch.equal(found, alone["a"])
    assert "Another task of this thread is within `using`, `rows` or `disabled`" in switched
    assert "was called by the task" in computed


HANDED_ON = {
    "prefix": (lambda: PrefixTuning(num_virtual_tokens=3), "attention.self.key"),
    "parallel": (lambda: BottleneckAdapter(variant="parallel", reduction_factor=4), "output.dense"),
}
"""What is handed from one module to another in a call, and a module between the two."""


@pytest.mark.parametrize("kind", HANDED_ON)
def test_two_threads_compute_with_one_adapter(kind: str) -> None:
    make_strategy, between = HANDED_ON[kind]
    model = make("bert").eval()
    stirred(attach(model, make_strategy()), 0.3)
    other_input = {"input_ids": inputs_for("bert")["input_ids"].flip(0)}
    with torch.no_grad():
        expected, second_expected = logits(model), model(**other_input).logits
    reached, second_done = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        if threading.current_thread().name == "other" and not reached.is_set():
            reached.set()
            second_done.wait(SECONDS)

    model.get_submodule(f"bert.encoder.layer.0.{between}").register_forward_pre_hook(stop)
    first = in_thread(lambda: logits(model))
    assert reached.wait(LIMIT)
    with torch.no_grad():
        second = model(**other_input).logits
    second_done.set()
    assert torch.equal(first.result(LIMIT), expected)
    assert torch.equal(second, second_expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bias_of_a_quantized_layer_is_the_same_after_two_calls_at_once(bits: Any) -> None:
    """bitsandbytes rounds it to the input's number format, in place, and it is put back after each call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    Quantization(bits, block_size=32, keep=["1"]).apply(model)
    layer = model[0]
    before = layer.bias.detach().clone()
    reached, goes_on = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        if threading.current_thread().name == "other":
            layer.bias.data = layer.bias.data.bfloat16()  # where the other one stands in the middle of its call
            reached.set()
            assert goes_on.wait(LIMIT)

    layer.register_forward_pre_hook(stop)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    other = in_thread(lambda: layer(x))
    assert reached.wait(LIMIT)

    def other_ends_first(*_: Any) -> None:
        if threading.current_thread().name != "other":
            goes_on.set()
            other.result(LIMIT)

    layer.register_forward_hook(other_ends_first, prepend=True)
    layer(x)
    assert torch.equal(layer.bias, before)


def test_one_thread_pays_nothing_and_a_model_within_a_block_can_be_copied(adapters: Adapters, alone: Any) -> None:
    model = adapters.model
    adapters.use("a")
    with adapters["a"].disabled():
        assert torch.equal(logits(copy.deepcopy(model)), alone[None])
    with adapters.rows(["a"] * 4):
        logits(model)
    fresh = make("bert")
    adapter = attach(fresh, LoRA(rank=2))
    with adapter.disabled():
        pass
    adapter.merge()
    hooked = {name for name, module in fresh.named_modules() if module._forward_pre_hooks}
    assert {name.rpartition(".")[2] for name in hooked} == {"deltas"}
