"""`peftlight chat`: each answer is what a plain loop over the model writes after the turns so far."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from commands.writers import POSITIONS, TEMPLATE, adapter_in, base_in, greedy, loaded, words_of
from peftlight.cli import main
from peftlight.strategies import IA3, LoRA, PrefixTuning

ENDS = (1, 3)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with a chat template, and adapters of three strategies."""
    folder = tmp_path_factory.mktemp("shelf")
    base = base_in(folder / "model", "llama", template=TEMPLATE)
    recipes = {"lora": LoRA(rank=4), "ia3": IA3(), "prefix": PrefixTuning(num_virtual_tokens=3)}
    made = {name: adapter_in(folder / name, base, recipe) for name, recipe in recipes.items()}
    return {"model": base, **made}


def chat(
    capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, script: str, *arguments: object
) -> tuple[list[str], str]:
    """The lines of answers that a chat prints, and its remarks."""
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(script.encode())))
    capsys.readouterr()
    assert main(["chat", "--traceback", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    return out.splitlines(), err


def answer(shelf: dict[str, Path], name: str, rendered: str, count: int = 5) -> str:
    words = words_of(shelf["model"])
    model = loaded(shelf["model"], None if name == "base" else shelf[name])
    tokens = greedy(model, words(rendered, add_special_tokens=False)["input_ids"], count, ENDS)
    return str(words.decode(tokens, skip_special_tokens=True))


def printed(name: str, text: str) -> list[str]:
    return f"{name}: {text.lstrip()}\n".splitlines()


def test_each_turn_is_answered_after_all_turns_before(
    shelf: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = answer(shelf, "lora", "<system>be[PAD]<user>a film[PAD]<assistant>")
    two = answer(shelf, "lora", f"<system>be[PAD]<user>a film[PAD]<assistant>{one.strip()}[PAD]<user>x[PAD]<assistant>")
    alone = answer(shelf, "lora", "<user>x[PAD]<assistant>")
    script = "a film\n\n   \nx\n/system\n/reset\nx"
    lines, _ = chat(capsys, monkeypatch, script, shelf["lora"], "--max_new_tokens", 5, "--system", "be")
    assert lines == [*printed("lora", one), *printed("lora", two), *printed("lora", alone)]
    assert len({one, two, alone}) == 3


def test_adapters_of_several_strategies_answer_in_one_chat(
    shelf: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["lora", "base", "prefix", "ia3", "lora"]
    script = "".join(f"/adapter {name}\n/reset\na film\n" for name in names)
    adapters = [shelf[name] for name in ("ia3", "lora", "prefix")]
    lines, said = chat(capsys, monkeypatch, script, *adapters, "--max_new_tokens", 5)
    texts = [answer(shelf, name, "<user>a film[PAD]<assistant>") for name in names]
    assert lines == [line for name, text in zip(names, texts, strict=True) for line in printed(name, text)]
    assert len(set(texts)) == 4
    assert "ia3 answers" in said


def test_base_and_adapter_answer_side_by_side(
    shelf: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {name: answer(shelf, name, "<user>x[PAD]<assistant>", 3) for name in ("base", "lora")}
    kept = f"<user>x[PAD]<assistant>{texts['lora'].strip()}[PAD]<user>x[PAD]<assistant>"
    options = [shelf["lora"], "--max_new_tokens", 3]
    started, _ = chat(capsys, monkeypatch, "x\n/both\nx", *options, "--side_by_side", "true")
    switched, _ = chat(capsys, monkeypatch, "/both\nx\n/both\nx\n", *options)
    assert started == switched
    heads = [cell.strip() for cell in started[1].split("┃")[1:3]]
    cells = [cell.strip() for cell in started[3].split("│")[1:3]]
    assert (heads, cells) == (["base", "lora"], [texts["base"].strip(), texts["lora"].strip()])
    assert started[5:] == printed("lora", answer(shelf, "lora", kept, 3))
    _, said = chat(capsys, monkeypatch, "/adapter base\n/both", *options)
    assert "Beside base stands an adapter" in said


def test_commands_that_are_wrong_get_what_is_right_and_the_chat_goes_on(
    shelf: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ("/adaptor ia3\n/adapter lore\n/set temprature 1\n/set top_p 3\n/set seed often\n/both now\n/both\n"
              "/set\n/adapter\n/help\n/system be\nx\n/quit\na film\n")  # fmt: skip
    lines, said = chat(capsys, monkeypatch, script, shelf["lora"], "--max_new_tokens", 4)
    assert lines == printed("lora", answer(shelf, "lora", "<system>be[PAD]<user>x[PAD]<assistant>", 4))
    for expected in ("no command /adaptor. Did you mean 'adapter'", "no adapter 'lore'. Did you mean 'lora'",
                     "no setting 'temprature'. Did you mean 'temperature'", "top_p is a probability above 0",
                     "seed takes a number (int), not 'often'", "max_new_tokens 4, temperature 0.0", "base, lora",
                     "/quit", "leave"):  # fmt: skip
        assert expected in said, expected


def test_settings_change_and_a_seed_repeats_the_chat(
    shelf: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "/set temperature 1.5\n/set max_new_tokens 6\n{}x\n/reset\nx\nx\n"
    first, said = chat(capsys, monkeypatch, script.format(""), shelf["lora"])
    assert "temperature 1.5" in said
    assert chat(capsys, monkeypatch, script.format(""), shelf["lora"])[0] == first
    assert chat(capsys, monkeypatch, script.format("/set seed 4\n"), shelf["lora"])[0] != first


def test_a_full_context_loses_its_oldest_turns_with_a_note(
    shelf: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "x" * (POSITIONS - 40)
    kept = answer(shelf, "lora", "<user>a film[PAD]<assistant>", 3)
    script = f"{long}\n{long}\n{'x' * POSITIONS}\n/reset\na film\n"
    lines, said = chat(capsys, monkeypatch, script, shelf["lora"], "--max_new_tokens", 3)
    one = printed("lora", answer(shelf, "lora", f"<user>{long}[PAD]<assistant>", 3))
    assert lines == [*one, *one, *printed("lora", kept)]
    assert "the oldest 1 question with the answer" in said
    assert f"the model has {POSITIONS}. Shorten it." in said


def test_a_question_that_does_not_fit_alone_leaves_the_turns_before_it(
    shelf: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [shelf["lora"], "--max_new_tokens", 3]
    expected, _ = chat(capsys, monkeypatch, "a film\nsee\nx\n", *options)
    lines, said = chat(capsys, monkeypatch, f"a film\nsee\n{'x' * POSITIONS}\nx\n", *options)
    assert lines == expected
    assert lines[-1:] != printed("lora", answer(shelf, "lora", "<user>x[PAD]<assistant>", 3))[-1:]
    assert "Shorten it." in said
    assert "forgotten" not in said


def test_without_a_template_the_format_is_plain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("gpt2", "t5"):
        base = base_in(tmp_path / kind, kind)
        model, words, said = loaded(base), words_of(base), "be\n\nUser: x\nAssistant:"
        one = words.decode(greedy(model, words(said)["input_ids"], 4), skip_special_tokens=True)
        said += f" {one.strip()}\nUser: a film\nAssistant:"
        two = words.decode(greedy(model, words(said)["input_ids"], 4), skip_special_tokens=True)
        options = ["base", "--base", base, "--system", "be", "--max_new_tokens", 4]
        lines, _ = chat(capsys, monkeypatch, "x\na film", *options)
        assert lines == [*printed("base", one), *printed("base", two)]


def test_an_answer_is_told_as_it_comes_and_ends_before_the_next_question() -> None:
    import torch

    from peftlight.writing.answer import Answer

    pieces = ["Red", ", ", "\n", "Us", "ing", " caf", "\ufffd", "é", "\nUs", "er", ": more", "never"]

    def decode(tokens: list[int]) -> str:
        return "".join(pieces[token] for token in tokens).replace("\ufffdé", "é")

    told: list[str] = []
    listener = Answer(decode, [], "\nUser:", told.append)
    for token in range(len(pieces)):
        stop = listener(torch.tensor([[99, token]]), None)
        assert bool(stop) == (token >= 10)
    listener.end()
    assert told == ["Red", ", ", "\nUsing", " caf", "é"]
    assert listener.text == "Red, \nUsing café"


def test_input_that_is_no_text_is_refused(
    shelf: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert main(["chat", str(shelf["lora"])]) == 2
    assert "not UTF-8 (byte 0xe9)" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_then_the_chat(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 10**7, "eos_token_id": None}
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").unlink()
    words = words_of(base)
    words.eos_token = None
    words.save_pretrained(base)
    command = [sys.executable, "-W", "ignore", "-m", "peftlight", "chat", "base", "--base", str(base)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    options = ["--max_new_tokens", str(10**6)]
    with subprocess.Popen(command + options, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment) as running:
        assert running.stdin
        assert running.stdout
        too_late = threading.Timer(300, running.kill)
        too_late.start()
        running.stdin.write("a film\n")
        running.stdin.flush()
        assert running.stdout.read(40).startswith("base: ")
        running.send_signal(signal.SIGINT)
        running.stdin.write("/set max_new_tokens 2\nx\n")
        running.stdin.flush()
        assert any(line.startswith("base: ") for line in running.stdout)
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0
        too_late.cancel()
        assert "Traceback" not in running.stderr.read()  # type: ignore[union-attr]
