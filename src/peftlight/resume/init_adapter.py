"""`--init_adapter`: a new run whose adapter begins with the weights of another."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftlight.console import say
from peftlight.errors import UserError, one_line
from peftlight.handover.hub import adapter_folder
from peftlight.interop import load_adapter, read_record
from peftlight.resume.past import RUN, read_run
from peftlight.strategy import Adapter, PEFTStrategy
from peftlight.strategy_spec import StrategySpec, as_strategy, spec_of
from peftlight.tasks import PEFTModule

_SHOWN = 3
_OF_TRAINING = ("training", "enabled", "p", "inplace")
"""Settings of modules that say how they train, not what they compute."""


class InitialAdapter:
    """The weights of an adapter, for one of the same strategy."""

    def __init__(self, name: str) -> None:
        """
        Args:
            name: its folder, that of its run, or its name on the hub.

        Raises:
            UserError: there is no such adapter, or it is that of a run which has not come to its end.
        """
        _refuse_unfinished(Path(name))
        self.name, self.folder = name, adapter_folder(name)
        self._record = read_record(self.folder)
        self._state: dict[str, Tensor] = {}
        self._settings: dict[str, Any] = {}
        self._strategy: PEFTStrategy | None = None
        self._here: PEFTStrategy | None = None

    def facts(self) -> dict[str, str | None]:
        """Where the weights came from, for the records of the run."""
        return {"adapter": self.name, "sha256": self._record.sha256}

    def take(self, module: PEFTModule, model: nn.Module) -> None:
        """Read the weights, by putting the adapter on the base and taking it off again.

        Raises:
            UserError: it is another strategy's, belongs to another base, or to other labels.
        """
        here, there = getattr(module, "label_names", None), self._record.label_names
        if here and there and here != there:
            raise UserError(f"The adapter {self.name} tells {there} apart, in this order; the data has {here}. Give "
                            "data.labels in the adapter's order, or train a new one.")  # fmt: skip
        adapter = load_adapter(model, self.folder, keep_base=True)
        self._strategy, self._settings = adapter.strategy, _settings(adapter)
        self._here = module.strategy
        self._state = {name: value.clone() for name, value in adapter.state().items()}
        adapter.remove()
        if type(self._strategy) is not type(module.strategy):
            kinds = f"a {type(self._strategy).__name__}; the strategy here is {type(module.strategy).__name__}"
            raise UserError(f"The adapter {self.name} is {kinds}.{self._advice()}")

    def give(self, adapter: Adapter) -> None:
        """Put the weights into an adapter that was just attached.

        Raises:
            UserError: it is not of the same shapes, or computes something else with the same weights.
        """
        try:
            adapter.load_state(self._state, self.name)
        except UserError as error:
            raise UserError(f"{error}{self._advice()}") from None
        now = _settings(adapter)
        other = [f"{key} is {value} there, {now[key]} here" for key, value in self._settings.items()
                 if key in now and now[key] != value]  # fmt: skip
        if other:
            raise UserError(f"With these settings the adapter {self.name} would compute something else: "
                            f"{other[0]}.{self._advice()}")  # fmt: skip
        say(f"the adapter begins with the weights of {self.name}")

    def _advice(self) -> str:
        assert self._strategy is not None
        saved = self._record.strategy or spec_of(self._strategy)
        by, here = self._record.trained_by or saved, spec_of(self._here) if self._here else saved
        return (
            f"\n  It was trained by {by['class_path'].rpartition('.')[2]} and is saved as {_told(saved, here)}.\n"
            "  Give this as model.strategy; peftlight.json beside the adapter has all of it under 'strategy'."
        )


def _settings(adapter: Adapter) -> dict[str, Any]:
    """What decides, beside its weights, what each delta computes."""
    return {
        f"{site}: {f'{path}.{name}'.lstrip('.')}": value
        for site, delta in adapter.sites.items()
        for path, module in delta.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str) and name not in _OF_TRAINING and not name.startswith("_")
    }


def _told(spec: StrategySpec, here: StrategySpec) -> str:
    """The strategy with those of its fields that are not at their defaults, or are others `here`."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(as_strategy(spec))}  # type: ignore[arg-type]
    given, other = spec["init_args"], here["init_args"]
    fields = {name: value for name, value in given.items()
              if value != defaults[name] or value != other.get(name, value)}  # fmt: skip
    each = ", ".join(f"{name} {_short(value)}" for name, value in fields.items())
    return f"{spec['class_path'].rpartition('.')[2]}{f' with {each}' if each else ''}"


def _short(value: Any) -> str:
    """Of a long list its beginning, with how many more there are."""
    if not isinstance(value, list) or len(value) <= _SHOWN:
        return one_line(str(value))
    return f"{one_line(', '.join(map(str, value[:_SHOWN])))} and {len(value) - _SHOWN} more"


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _refuse_unfinished(folder: Path) -> None:
    if (folder / RUN).is_file() and not (folder / "adapter").exists() and not (folder / "adapter_config.json").exists():
        raise UserError(f"The run {folder} has no adapter: it has not come to its end (run.json says "
                        f"'{read_run(folder).get('state')}'). To go on with it: --resume {folder}; to begin a new run "
                        f"where it stands: --ckpt_path {folder}/checkpoints/last.ckpt")  # fmt: skip
