"""The command line's first step: help, version and misspelt commands answer here, before anything heavy is imported."""

import os
import signal
import sys
from collections.abc import Sequence

from peftlight import __version__
from peftlight.class_paths import to_type
from peftlight.environment import settle_environment
from peftlight.errors import UserError, half_character, nearest, one_line
from peftlight.own_modules import place_in
from peftlight.own_modules import take_out as without_imports
from peftlight.signals import Stopped, end_at_once_by

TRAINING = {
    "fit": "train, and write a run folder with the adapter, its metrics and its configuration",
    "validate": "compute the metrics on the validation data",
    "test": "compute the metrics on the test data",
    "predict": "write predictions for the rows of a file as JSONL",
}
"""Lightning's commands; they take configurations."""
AFTERWARDS = {
    "generate": "let an adapter write: after one prompt, or after each of a file or a pipe",
    "chat": "talk with a base and its adapters, side by side",
    "evaluate": "compare adapters and their base on a data set",
    "inspect": "say what an adapter is: method, base, size, and how far it moves each layer",
    "diff": "compare two adapters layer by layer",
    "combine": "make one adapter of several",
    "merge": "write base and adapter as one plain model, with a certificate that they compute the same",
    "push": "publish an adapter on the hub, with its card",
    "verify": "prove on your configuration that resuming, several processes, saving or merging change nothing",
    "replay": "train the first steps of a recorded run again, and say whether they agree",
}
"""What is done with a trained adapter or a run, and proofs; each has its file in `commands/`."""
COMMANDS = TRAINING | AFTERWARDS

_HELP = f"""peftlight {__version__}: parameter-efficient fine-tuning on PyTorch Lightning

usage: peftlight COMMAND --config FILE [--config FILE ...] [--KEY VALUE ...]
{{training}}

       peftlight COMMAND ADAPTER ... [--OPTION VALUE ...]
{{afterwards}}

  peftlight COMMAND --help        the options, of the first commands those used most
  peftlight COMMAND --help-all    every option
  peftlight --version             the version
"""

_COMMAND_HELP = """usage: peftlight {command} --config FILE [--config FILE ...] [--KEY VALUE ...]

{command}: {what}

  --config FILE                    a YAML; of several, later ones win key by key
  --print_config                   print the resulting configuration and stop
  --model CLASS                    the task: SequenceClassification, TokenClassification, CausalLM, Seq2Seq,
                                   ImageClassification
  --model.base_model NAME          hub id, folder, .gguf file, or pypi:PACKAGE
  --model.strategy CLASS           LoRA, BitFit, Full, or the path of your own class
  --model.strategy.KEY VALUE       a hyperparameter of the strategy: rank, alpha, target_modules ...
  --data CLASS                     SST2, Alpaca, EnglishQuotes, TextClassification, Instructions, Messages, PlainText,
                                   SourceTarget, InstructionPairs, CoNLL2003, TaggedWords, Images
  --data.source NAME               hub id, file, folder or glob
  --optimizer CLASS                AdamW, MuonAndAdamW and every other of torch; --optimizer.lr 1e-4
  --lr_scheduler CLASS             LinearWarmup and every other of torch
  --trainer.KEY VALUE              max_epochs, devices, strategy, precision, accumulate_grad_batches ...
  --seed_everything N              the seed of all random numbers
  --ckpt_path FILE                 a checkpoint to begin from or to evaluate
  --import FILE_OR_MODULE          a Python file or module with classes of your own, where it lies elsewhere
{beginning}  --traceback                      on an error, show where in the code it happened

  peftlight {command} --help-all          every option
  peftlight {command} --data.help SST2    the options of one class
"""
BEGINNING = """\
  --resume RUN                     go on with a run, by its folder or a checkpoint; alone: the newest of --config
  --allow_changes KEY ...          what may differ from the run that goes on; a refusal says the names
  --init_adapter ADAPTER           begin a new run with an adapter's weights: its folder, or its name on the hub
"""
"""The options of `fit` alone."""
_PREDICT_HELP = """usage: peftlight predict ADAPTER FILE [--OPTION VALUE ...]

predict: write predictions for the rows of a file as JSONL; what is not given is as in the adapter's run

  ADAPTER                          folder of the adapter or of its run, or its name on the hub
  FILE                             rows as in the training, without their answers; or images in a folder
  --out FILE                       where the predictions go; by default they are printed
  --config FILE                    a YAML that says how rows are read; or --data CLASS
  --columns '{text: review}'       names of the rows' columns by ours, where they differ
  --base NAME                      the base instead of the one that the adapter names

  peftlight predict ADAPTER --help          every option of this form

Or, with a configuration alone:

"""
_LONGEST = 2000
"""Characters of a line of an error."""
_WITHOUT_VALUE = {"-h", "--help", "--help-all"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. The exit code is 0, 2 for an error of the user's, 1 for another, 128 + N for signal N."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in given
    given = [argument for argument in given if argument != "--traceback"]
    answer = _quick_answer(given)
    if answer is not None:
        print(answer)
        return 0
    try:
        _check_command(given)
        settle_environment()
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # so that a configuration can name the user's own classes
        with end_at_once_by(signal.SIGTERM):
            return _run([argument.replace("--help-all", "--help") for argument in given])
    except KeyboardInterrupt:
        print("peftlight: interrupted", file=sys.stderr)
        return 130  # what shells report of a program that Ctrl-C ended
    except Stopped as stopped:
        print(f"peftlight: ended by {stopped.name}", file=sys.stderr)
        return stopped.exit_code
    except Exception as error:
        code = 1 if traceback else _say(error, given)
        _tell_other_machines(error)
        if traceback:
            raise
        return code


def _say(error: Exception, given: list[str]) -> int:
    """Print the error of a command, and return its exit code."""
    if not isinstance(error, UserError | OSError):
        told, place = f"{type(error).__name__}: {error}", place_in(error)
        what = f"error in {place}" if place else "unexpected error"
        print(f"peftlight: {what}: {told}\n  --traceback shows where it happened.", file=sys.stderr)
        return 1
    text = "\n".join([str(error), *filter(None, [to_type(error, given)])])
    lines = (one_line(line) for line in text.split("\n"))  # a file's text must not steer the terminal
    shown = "\n".join(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..." for line in lines)
    print(f"peftlight: error: {shown}", file=sys.stderr)
    return 2


def _tell_other_machines(error: Exception) -> None:
    """Under torchrun, where their processes may wait for this one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from peftlight.watching import tell_early

        tell_early(error)


def _run(given: list[str]) -> int:
    """The exit code; a proof that does not hold has 1."""
    command, rest = given[0], given[1:]
    if command in AFTERWARDS or (command == "predict" and _names_adapter(rest)):
        from peftlight.commands.call import call

        return call(command, rest)
    from peftlight.config_errors.given import read_given
    from peftlight.resume.asked import take_out

    others = take_out(without_imports(given)[1])[1]
    read_given(others)  # a file that is missing or no YAML is refused before seconds of imports
    from peftlight.lightning_cli import run

    with end_at_once_by(signal.SIGINT):  # Lightning would take a KeyboardInterrupt for a failure
        run(given)
    return 0


def _names_adapter(rest: list[str]) -> bool:
    """Whether there is a word that is neither an option nor an option's value: Lightning's form has none."""
    before = ["", *rest]
    return any(
        not word.startswith("-") and (not last.startswith("-") or "=" in last or last in _WITHOUT_VALUE)
        for last, word in zip(before, rest, strict=False)
    )


def _quick_answer(given: list[str]) -> str | None:
    if not given or given[0] in ("-h", "--help"):
        afterwards = {"predict": TRAINING["predict"], **AFTERWARDS}
        return _HELP.format(training=_listing(TRAINING), afterwards=_listing(afterwards))
    if given[0] in ("-V", "--version"):
        return f"peftlight {__version__}"
    if given[0] in TRAINING and given[1:] in (["-h"], ["--help"]):
        first = _PREDICT_HELP if given[0] == "predict" else ""
        return first + _COMMAND_HELP.format(
            command=given[0], what=COMMANDS[given[0]], beginning=BEGINNING if given[0] == "fit" else ""
        )
    return None


def _listing(commands: dict[str, str]) -> str:
    return "\n".join(f"  {name:10}{what}" for name, what in commands.items())


def _check_command(given: list[str]) -> None:
    for argument in given:
        if half_character(argument):
            raise UserError(f"{argument!a} on the command line holds bytes that are not UTF-8.")
    if given[0].startswith("-"):
        raise UserError(f"A command comes first, then its options: peftlight fit {' '.join(given)}")
    if given[0] not in COMMANDS:
        raise UserError(f"There is no command {given[0]!r}.{nearest(given[0], COMMANDS)} "
                        f"Commands: {', '.join(COMMANDS)}.")  # fmt: skip
