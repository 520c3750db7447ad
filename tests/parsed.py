"""What the command line makes of its arguments, before anything is loaded; one parser for many command lines."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import yaml

from peftlight.lightning_cli import PeftlightCLI
from peftlight.resume.asked import take_out
from peftlight.resume.beginning import Beginning


class _Parsed(Exception):
    """Ends a command once its arguments are parsed."""


class Parsed:
    """`peftlight fit`, as far as its configuration."""

    def __init__(self) -> None:
        self._cli: Any = None

        def take(cli: PeftlightCLI) -> None:
            self._cli = cli
            raise _Parsed

        with mock.patch.object(PeftlightCLI, "before_instantiate_classes", take):
            self._parse(["--model=SequenceClassification", "--model.base_model=x", "--model.strategy=LoRA",
                         "--data=SST2"])  # fmt: skip

    def _parse(self, arguments: Sequence[str]) -> None:
        beginning = Beginning(*take_out(["fit", *arguments]))
        with mock.patch.object(sys, "argv", ["peftlight", "fit", *arguments]):
            if self._cli is not None:
                self._cli.beginning = beginning
                self._cli.parse_arguments(self._cli.parser, None)
                return
            with contextlib.suppress(_Parsed):
                PeftlightCLI(beginning)

    def config(self, *arguments: str) -> tuple[dict[str, Any], list[str]]:
        """The resolved configuration as plain data, and what is said of it."""
        self._parse(arguments)
        return yaml.safe_load(self._cli._as_yaml()), self._cli.remarks

    def module(self, *arguments: str) -> Any:
        """The task, whose optimizer and schedule are made as the arguments say."""
        self._parse(arguments)
        return self._cli.parser.instantiate_classes(self._cli.config).fit.model
