"""`peftlight generate`: what it writes is what a plain loop over the model writes, in any batch and from any source."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands.trained import COMMAND_LINE, fitted
from commands.writers import POSITIONS, TEMPLATE, adapter_in, base_in, greedy, loaded, records, words_of
from peftlight.cli import main
from peftlight.data import Instructions, Messages, PlainText, SourceTarget
from peftlight.strategies import IA3, LoRA, PrefixTuning, PromptTuning, PTuning

pytestmark = COMMAND_LINE
STRATEGIES = {
    "lora": lambda: LoRA(rank=4),
    "prefix": lambda: PrefixTuning(num_virtual_tokens=3),
    "prompt": lambda: PromptTuning(num_virtual_tokens=3),
    "p_tuning": lambda: PTuning(num_virtual_tokens=3),
}
PROMPTS = [
    "a film",
    "patience is a slow river and nothing here works, " * 2,
    "x",
    "write a list",
    "a film to see again",
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: base_in(tmp_path_factory.mktemp("bases") / kind, kind) for kind in ("gpt2", "llama", "t5")}


@pytest.fixture(scope="module")
def lora(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_in(tmp_path_factory.mktemp("adapters") / "lora", bases["llama"], LoRA(rank=4))


def written(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a successful command prints."""
    capsys.readouterr()
    assert main(["generate", "--traceback", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a refused command says."""
    capsys.readouterr()
    assert main(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def piped(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_every_row_of_a_batch_is_what_a_loop_without_padding_and_cache_writes(
    kind: str, strategy: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bases[kind]
    adapter = adapter_in(tmp_path / "trained", base, STRATEGIES[strategy]())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = ["--file", prompts, "--max_new_tokens", 9]
    rows = records(written(capsys, "base", adapter, *options, "--batch_size", 3))
    assert rows == records(written(capsys, "base", adapter, *options, "--batch_size", 1))
    words = words_of(base)
    models, expected = [loaded(base), loaded(base, adapter)], []
    for prompt in PROMPTS:
        for model in models:
            tokens = greedy(model, words(prompt)["input_ids"], 9)
            expected.append((words.decode(tokens, skip_special_tokens=True), len(tokens)))
    assert [(row["completion"], row["tokens"]) for row in rows] == expected
    assert [(row["id"], row["adapter"]) for row in rows[:3]] == [(0, "base"), (0, "trained"), (1, "base")]
    assert len({completion for completion, _ in expected}) > 6


def test_a_tokenizer_without_padding_token_changes_nothing(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bare = base_in(tmp_path / "bare", "gpt2", pad=False)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = ["--file", prompts, "--max_new_tokens", 9]
    assert written(capsys, "base", "--base", bare, *options) == written(
        capsys, "base", "--base", bases["gpt2"], *options
    )


DRAWN = {
    "drawn": ["--temperature", 1.5],
    "all": ["--temperature", 0.8, "--top_p", 0.7, "--top_k", 20, "--repetition_penalty", 1.3],
    "greedy": ["--repetition_penalty", 2],
}


@pytest.mark.parametrize("options", DRAWN.values(), ids=DRAWN)
def test_what_is_drawn_depends_on_seed_and_prompt_and_not_on_the_batch(
    options: list[object], bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    given = ["base", "--base", bases["llama"], "--file", prompts, "--max_new_tokens", 8, *options]
    one = written(capsys, *given, "--batch_size", 1)
    assert written(capsys, *given, "--batch_size", 4) == one
    other = written(capsys, *given, "--seed", 1)
    assert (other == one) == ("--temperature" not in options)


def test_the_settings_that_a_base_brings_do_not_count(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_in(tmp_path / "base", "llama")
    settings = json.loads((base / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 2.0, "repetition_penalty": 3.0, "num_beams": 2, "max_length": 3}
    (base / "generation_config.json").write_text(json.dumps(settings))
    options = ["--prompt", "a film", "--max_new_tokens", 8]
    assert written(capsys, "base", "--base", base, *options) == written(
        capsys, "base", "--base", bases["llama"], *options
    )


RENDERED = {
    "instructions": (Instructions(source="x"), "### Instruction:\na film\n\n### Response:\n"),
    "messages": (Messages(source="x"), "<user>a film[PAD]<assistant>"),
    "own template": (
        Instructions(source="x", template="{instruction}|{input}|", template_without_input="Q {instruction} A"),
        "Q a film A",
    ),
    "plain": (PlainText(source="x"), "a film"),
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_prompt_is_put_as_in_the_training(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, text = RENDERED[name]
    base = base_in(tmp_path / "base", "llama", template=TEMPLATE)
    words, settings = words_of(base), data.encoder("predict", None).settings()
    folder = adapter_in(tmp_path / "trained", base, IA3(), encoder=settings)
    expected = greedy(loaded(base, folder), _whole(name, text, words), 6, ends=(1, 3))
    shown = written(capsys, folder, "--prompt", "a film", "--max_new_tokens", 6)
    assert shown == words.decode(expected, skip_special_tokens=True) + "\n"
    chosen = "chat" if name == "messages" else "plain" if name == "plain" else None
    if chosen:
        unsaid = adapter_in(tmp_path / "unsaid", base, IA3())
        assert written(capsys, unsaid, "--prompt", "a film", "--max_new_tokens", 6, "--template", chosen) == shown


def _whole(name: str, text: str, words: object) -> list[int]:
    if name == "instructions":  # the beginning of the shipped template is its own business
        from peftlight.data.instructions import WITHOUT_INPUT

        assert WITHOUT_INPUT.endswith(text.replace("a film", "{instruction}"))
        text = WITHOUT_INPUT.replace("{instruction}", "a film")
    return words(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return,operator]


def test_an_encoder_decoder_gets_the_prefix_of_its_training(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SourceTarget(source="x", prefix="write: ").encoder("predict", None).settings()
    folder = adapter_in(tmp_path / "trained", bases["t5"], LoRA(), encoder=settings)
    words = words_of(bases["t5"])
    expected = greedy(loaded(bases["t5"], folder), words("write: a film")["input_ids"], 6)
    shown = written(capsys, folder, "--prompt", "a film", "--max_new_tokens", 6)
    assert shown == words.decode(expected, skip_special_tokens=True) + "\n"


def test_the_columns_of_a_file_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """prompt; those of the training, under the names that it gave them; messages."""
    base = base_in(tmp_path / "base", "llama", template=TEMPLATE)
    template = {"template": "{instruction}|{input}|", "template_without_input": "{instruction}|"}
    data = Instructions(source="x", columns={"instruction": "question"}, **template)  # type: ignore[arg-type]
    folder = adapter_in(tmp_path / "a", base, LoRA(), encoder=data.encoder("predict", None).settings())
    files = {
        "p.jsonl": ('{"prompt": "a film"}\n{"prompt": "x"}', ["a film|", "x|"]),
        "p.csv": ("question,input,output\na film,again,\nx,,\n", ["a film|again|", "x|"]),
        "p.json": ('[{"messages": [{"role": "user", "content": "a film"}]}]', ["<user>a film<assistant>"]),
        "p.txt": ("a film\n\n  \nx\n", ["a film|", "x|"]),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_text(content)
        rows = records(written(capsys, folder, "--file", tmp_path / name, "--max_new_tokens", 1))
        assert [row["prompt"] for row in rows] == expected
        assert [row["id"] for row in rows] == list(range(len(expected)))


def test_answers_go_to_a_file_at_once_and_whole(tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    options = [lora, "--file", tmp_path / "p.txt", "--max_new_tokens", 4]
    shown = written(capsys, *options)
    assert written(capsys, *options, "--out", tmp_path / "answers.jsonl") == ""
    assert (tmp_path / "answers.jsonl").read_text() == shown
    assert records(shown)[0].keys() == {"id", "adapter", "prompt", "completion", "finish_reason", "tokens"}


@pytest.mark.parametrize("which", ["base", "tokenizer", "turn"])
def test_an_answer_ends_where_base_tokenizer_or_chat_template_end_it(
    which: str, tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(bases["llama"])
    tokens = greedy(loaded(bases["llama"]), words("a film")["input_ids"], 6)
    place = next(place for place, token in enumerate(tokens) if place > 1 and token not in tokens[:place])
    end = words.convert_ids_to_tokens(tokens[place])
    base = base_in(tmp_path / "base", "llama", template=TEMPLATE.replace("[PAD]", end if which == "turn" else "|"))
    if which == "base":
        settings = json.loads((base / "generation_config.json").read_text())
        (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [tokens[place], 399]}))
    else:
        special = words_of(base)
        special.add_tokens([end], special_tokens=True)
        if which == "tokenizer":
            special.eos_token = end
        special.save_pretrained(base)
    options = ["--file", tmp_path / "p.txt", "--max_new_tokens", 6]
    (tmp_path / "p.txt").write_text("a film")
    (row,) = records(written(capsys, "base", "--base", base, *options))
    assert (row["finish_reason"], row["tokens"]) == ("stop", place + 1)
    (row,) = records(written(capsys, "base", "--base", bases["llama"], *options))
    assert (row["finish_reason"], row["tokens"]) == ("length", 6)


def test_two_are_shown_side_by_side(lora: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shown = written(capsys, "base", f"mine={lora}", "--prompt", "a film", "--max_new_tokens", 3)
    words, expected = words_of(bases["llama"]), {}
    for name, folder in (("base", None), ("mine", lora)):
        tokens = greedy(loaded(bases["llama"], folder), words("a film")["input_ids"], 3)
        expected[name] = words.decode(tokens, skip_special_tokens=True).strip()
    heads, cells = (
        [cell.strip() for cell in shown.splitlines()[line].split(mark)[1:3]] for line, mark in ((1, "┃"), (3, "│"))
    )
    assert dict(zip(heads, cells, strict=True)) == expected


def test_bad_input_is_refused_with_what_to_do(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.csv").write_text("question\nwhy\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    (tmp_path / "p.doc").write_text("x")
    cases = {
        "--prompt, line 1: 'text' is an empty text": ["--prompt", " "],
        "choose one": ["--prompt", "x", "--file", "y"],
        "There is no file": ["--file", tmp_path / "p.cvs"],
        "Did you mean 'p.csv'": ["--file", tmp_path / "p.cvs"],
        "Columns found: question. Expected one of: prompt, text, messages": ["--file", tmp_path / "p.csv"],
        "empty.txt is empty": ["--file", tmp_path / "empty.txt"],
        "latin.txt, line 2: not UTF-8 (byte 0xe9)": ["--file", tmp_path / "latin.txt"],
        "cannot read files ending in '.doc'": ["--file", tmp_path / "p.doc"],
        "temperature is at least 0; it is -1": ["--prompt", "x", "--temperature", "-1"],
        "top_p is a probability": ["--prompt", "x", "--top_p", "1.5"],
        "batch_size is at least 1": ["--prompt", "x", "--batch_size", "0"],
        "has no chat template": ["--prompt", "x", "--template", "chat"],
        f"positions are needed, and the model has {POSITIONS}": ["--prompt", "x", "--max_new_tokens", POSITIONS],
        f"--max_new_tokens {POSITIONS - 1} or less": ["--prompt", "x", "--max_new_tokens", POSITIONS],
    }  # fmt: skip
    for said, options in cases.items():
        assert said in refused(capsys, lora, *options), said
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "nothing to write after" in refused(capsys, lora)
    assert "Say which base" in refused(capsys, "base", "--prompt", "x")
    assert "'base' is the model without adapters" in refused(capsys, f"base={lora}", "--prompt", "x")
    long = "x" * (POSITIONS + 5)
    assert "Shorten it" in refused(capsys, lora, "--prompt", long)
    (tmp_path / "two.txt").write_text(f"x\n{long}")
    assert "two.txt, line 2, " in refused(capsys, lora, "--file", tmp_path / "two.txt", "--max_new_tokens", 3)


def test_virtual_tokens_take_positions_too(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter_in(tmp_path / "prompt", bases["gpt2"], PromptTuning(num_virtual_tokens=6))
    count = POSITIONS - 6 - 1
    written(capsys, folder, "--prompt", "x", "--max_new_tokens", count)
    assert "6 virtual tokens" in refused(capsys, folder, "--prompt", "x", "--max_new_tokens", count + 1)


def test_a_classifier_is_sent_to_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from models import make
    from peftlight import attach, save_adapter

    base = make("bert")
    base.save_pretrained(tmp_path / "bert")
    words_of(base_in(tmp_path / "t", "llama")).save_pretrained(tmp_path / "bert")
    save_adapter(attach(base, LoRA(), modules_to_train=["classifier"]), tmp_path / "a",
                 {"base": {"name": str(tmp_path / "bert"), "auto_class": "AutoModelForSequenceClassification"},
                  "label_names": ["a", "b", "c"]})  # fmt: skip
    assert "peftlight predict" in refused(capsys, tmp_path / "a", "--prompt", "x")


def test_damaged_or_unknown_records_of_prompts_are_refused(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Instructions(source="x").encoder("predict", None).settings()
    cases = {
        "class that is not peftlight's, Mine": {**good, "encoder": "Mine"},
        "damaged": {**good, "template": 3},
        "damaged: InstructionEncoder takes": {key: value for key, value in good.items() if key != "template"},
        "not peftlight's, None": ["os.system"],
    }
    for number, (said, encoder) in enumerate(cases.items()):
        folder = adapter_in(tmp_path / str(number), bases["llama"], IA3(), encoder=encoder)
        assert said in refused(capsys, folder, "--prompt", "x")
        written(capsys, folder, "--prompt", "x", "--max_new_tokens", 1, "--template", "plain")


def test_lines_of_a_pipe_are_answered_in_order(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    expected = written(capsys, lora, "--file", tmp_path / "p.txt", "--max_new_tokens", 4)
    for batch in ([], ["--batch_size", 2]):
        piped(monkeypatch, "\r\n\n".join(PROMPTS).encode())
        found = written(capsys, lora, "--max_new_tokens", 4, *batch)
        assert [row | {"prompt": ""} for row in records(found)] == [row | {"prompt": ""} for row in records(expected)]
    piped(monkeypatch, b"")
    assert written(capsys, lora) == ""


def test_a_run_records_how_its_prompts_were_put(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "data.yaml"
    template = {"template": "{instruction}|{input}|", "template_without_input": "do {instruction}|"}
    overlay.write_text(json.dumps({"data": {"init_args": {**template, "columns": {"output": "output"}}}}))
    sizes = {"data__source": "sample:instructions", "data__max_length": 40, "data__max_empty": 1}
    run = fitted(tmp_path / "runs", bases["llama"], "lora", "data/alpaca", str(overlay.with_suffix("")), **sizes)
    (tmp_path / "p.txt").write_text("a film")
    (row,) = records(written(capsys, run, "--file", tmp_path / "p.txt", "--max_new_tokens", 2))
    assert row["prompt"] == "do a film|"


def test_the_help_costs_nothing() -> None:
    for command in ("generate", "chat"):
        code = (
            "import sys\nfrom peftlight.cli import main\n"
            f"try:\n    main([{command!r}, '--help'])\nexcept SystemExit:\n    pass\n"
            "print(sorted({'torch', 'lightning', 'transformers', 'rich'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "--side_by_side" in done.stdout or "--prompt" in done.stdout
        assert done.stdout.strip().endswith("[]")


def process(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", "-m", "peftlight", "generate", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment)


def test_each_line_is_answered_before_the_next_comes_and_a_closed_reader_is_no_error(lora: Path) -> None:
    with process(lora, "--max_new_tokens", 2) as running:
        assert running.stdin
        assert running.stdout
        assert running.stderr
        for number, prompt in enumerate(PROMPTS[:2]):
            running.stdin.write(prompt + "\n")
            running.stdin.flush()
            assert json.loads(running.stdout.readline())["id"] == number
        running.stdout.close()  # as head does
        running.stdin.write("x\n" * 3)
        running.stdin.close()
        said = running.stderr.read()
        assert running.wait(60) == 0
        assert "rror" not in said


def test_the_noise_is_a_sample_of_the_softmax() -> None:
    """Against the probabilities themselves, over many rows; and its nucleus against a sum by hand."""
    from peftlight.writing.choosing import Choosing, nucleus
    from peftlight.writing.settings import Settings

    scores = torch.tensor([[1.0, 0.0, 2.0, -1.0]])
    rows = 20_000
    chosen = Choosing(Settings(temperature=0.5), list(range(rows)), [0] * rows)(
        torch.zeros(rows, 1, dtype=torch.long), scores.expand(rows, -1)
    )
    shares = torch.bincount(chosen.argmax(1), minlength=4) / rows
    assert (shares - (scores[0] / 0.5).softmax(0)).abs().max() < 0.01
    assert (nucleus(scores, 0.7) > -torch.inf).tolist() == [[True, False, True, False]]  # 0.64, then 0.24
    assert (nucleus(scores, 0.6) > -torch.inf).tolist() == [[False, False, True, False]]


def test_padding_is_not_taken_for_what_was_said() -> None:
    from peftlight.writing.choosing import Choosing
    from peftlight.writing.settings import Settings

    scores = torch.tensor([[4.0, -4.0, 2.0, 1.0]] * 2)
    tokens = torch.tensor([[2, 2, 0, 1], [2, 2, 0, 1]])
    changed = Choosing(Settings(repetition_penalty=2), [0, 1], [2, 0])(tokens, scores)
    assert changed.tolist() == [[2, -8, 2, 1], [2, -8, 1, 1]]
