"""The LightningDataModule of all families of data: fields, stages and loaders."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from peftlight.data.cells import check_names
from peftlight.data.layout import Layout, Quoting, layout_of
from peftlight.data.preparing import Preparation
from peftlight.data.sampling import EpochSampler, InOrder, Sampled
from peftlight.data.sources import Special, Split, find_splits
from peftlight.data.summary import RowCounts
from peftlight.errors import UserError

Collate = Callable[[Any], dict[str, Any]]

_GIVE = {
    "train": "Give training rows: --data.source FILE",
    "validation": "Give --data.validation_source FILE, or a source with a training split to set rows aside from",
    "test": "Give --data.test_source FILE",
    "predict": "Give --data.predict_source FILE",
}


@dataclass(eq=False, kw_only=True)
class DataFamily(LightningDataModule, ABC):
    """Rows from files or the hub for each stage; a kind of data says how they are prepared and put into batches."""

    column_names: ClassVar[tuple[str, ...]] = ()
    made_for: ClassVar[str] = ""
    """The name of the task that learns from these batches; empty: any."""
    least: ClassVar[dict[str, int]] = {"batch_size": 1, "num_workers": 0}

    source: str
    """A file (json, jsonl, csv, tsv, parquet), a folder or glob of files ending in train/validation/test, a data set of
    the Hugging Face hub, or a sample that is built in, as sample:NAME."""
    subset: str | None = None
    """The hub data set's configuration, where it has several."""
    validation_source: str | None = None
    """A file of its own for validation."""
    test_source: str | None = None
    """A file of its own for testing."""
    predict_source: str | None = None
    """A file of its own to predict; otherwise the test split, or else the validation split."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column to the file's, like {text: review, label: stars}."""
    delimiter: str | None = None
    """The separator of the cells in csv and tsv files, or the word tab; none: it is found in each file."""
    quoting: Quoting | None = None
    """The quotes in those files. minimal: cells may stand in double quotes, and a quote in them is doubled; escaped: it
    stands after a backslash; none: quotes are text. Without it they are found in each file."""
    batch_size: int = 8
    """Rows per batch and device."""
    validation_size: int | float = 0.05
    """Rows, or share of rows, that are set aside for validation when there is no validation split."""
    split_seed: int = 42
    """Chooses those rows; other random numbers do not change them."""
    num_workers: int = 0
    """Processes that prepare batches; 0 is the main process."""
    cache_dir: str | None = None
    """Folder for prepared data; by default $PEFTLIGHT_CACHE or ~/.cache/peftlight."""

    def __post_init__(self) -> None:
        super().__init__()
        self._check_fields()
        self._prepared: Preparation[Any] | None = None
        self._seed: int | None = None

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Lightning's own would obey a checkpoint that names code; ours hold no settings of data.

        Raises:
            UserError: always.
        """
        raise UserError(f"A checkpoint holds no settings of data: make {cls.__name__} from those in config.yaml.")

    def _check_fields(self) -> None:
        check_names(self.columns, self.column_names)
        layout_of(self.delimiter, self.quoting)
        for name, least in self.least.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}; it is {getattr(self, name)}.")
        if self.validation_size <= 0 or (isinstance(self.validation_size, float) and self.validation_size >= 1):
            expected = "a share between 0 and 1 or a number of rows"
            raise UserError(f"validation_size must be {expected}; it is {self.validation_size}.")

    # ---- what a kind of data defines

    @abstractmethod
    def prepare(self, stage: str | None) -> Preparation[Any]:
        """The stage's data sets, through the cache."""

    @abstractmethod
    def collator(self, role: str) -> Collate:
        """What makes a batch of a role's rows."""

    def find_label_names(self, train: Callable[[], Any]) -> list[str] | None:
        """The names of the classes, where a family has classes; `train` gives the training split's content."""
        return None

    # ---- what others read

    @property
    def label_names(self) -> list[str] | None:
        """The names of the classes in order; None for language modelling. Known after `setup`."""
        return self._ready().label_names

    @property
    def fingerprint(self) -> str:
        """The sha256 over the content of all splits in use. Known after `setup`."""
        return self._ready().fingerprint

    @property
    def summaries(self) -> dict[str, RowCounts]:
        """What became of the rows of each split in use. Known after `setup`."""
        return self._ready().summaries

    @property
    def tests_on_validation(self) -> bool:
        """Whether the test rows have no labels, so that testing reads the validation rows. Known after `setup`."""
        prepared = self._ready()
        return prepared.serving("test") is prepared.serving("validation")

    def where(self, row: int) -> str:
        """File and number of a training row, given the `row` that batches carry. Known after `setup`."""
        return self._ready().where(row)

    def other_sources(self) -> dict[str, str | None]:
        """The roles that may have a source of their own, and which."""
        return {"validation": self.validation_source, "test": self.test_source, "predict": self.predict_source}

    @property
    def layout(self) -> Layout:
        """What is said of the cells of csv and tsv files."""
        return layout_of(self.delimiter, self.quoting)

    def find_splits(self, special: Special = lambda source: None) -> dict[str, Split]:
        """The files or hub splits of each role; `special` knows sources that only one kind of data has."""
        return find_splits(self.source, self.subset, self.other_sources(), self.layout, special)

    # ---- Lightning's hooks

    def prepare_data(self) -> None:
        """Prepare what is not in the cache yet. Lightning calls it in one process per machine."""
        self.prepare(str(self.trainer.state.fn.value) if self.trainer and self.trainer.state.fn else None)

    def setup(self, stage: str | None = None) -> None:
        """Load the stage's splits from the cache."""
        self._prepared = prepared = self.prepare(stage)
        for notice in prepared.notices:
            rank_zero_warn(notice)
        for finding in dict.fromkeys(prepared.findings):
            rank_zero_info(finding)
        for role, summary in prepared.summaries.items():
            rank_zero_info(f"{role}: {summary}")

    def train_dataloader(self) -> DataLoader[Any]:
        """The training rows in random order."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation rows."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test rows, or the validation rows where those have no labels."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The rows to predict, without their answers; texts are padded at the left if they are prompts."""
        return self._loader("predict")

    def global_batches(self) -> DataLoader[Any]:
        """The training rows in the batches that all processes have together; the same in each of them."""
        everything = {"num_replicas": 1, "rank": 0}
        return self._loader("train", self.trainer.world_size if self.trainer else 1, everything)

    def state_dict(self) -> dict[str, Any]:
        """The seed of the order of the training rows."""
        return {} if self._seed is None else {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the training rows in the order of an earlier run."""
        self._seed = state_dict.get("seed")

    def _loader(self, role: str, times: int = 1, share: dict[str, int] | None = None) -> DataLoader[Any]:
        datasets = self._ready().datasets
        if role not in datasets:
            raise UserError(f"{self.source} has no {role} split. {_GIVE[role]}")
        if role == "predict":
            self._check_shares(len(datasets[role]))  # type: ignore[arg-type]
        # Lightning shares out the rows to predict itself: none of them must be there twice.
        sampler = None if role == "predict" else self._sampler(role, len(datasets[role]), share)  # type: ignore[arg-type]
        return DataLoader(
            Sampled(datasets[role]) if sampler else datasets[role],
            batch_size=self.batch_size * times,
            sampler=sampler,
            collate_fn=self.collator(role),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each epoch would draw from the numbers of the training
        )

    def _check_shares(self, rows: int) -> None:
        processes = self.trainer.world_size if self.trainer else 1
        if 0 < rows < processes:
            raise UserError(f"Each of the {processes} processes needs a row to predict, and rows there are {rows}: "
                            "--trainer.devices 1")  # fmt: skip

    def _sampler(self, role: str, rows: int, share: dict[str, int] | None) -> EpochSampler:
        trainer: Any = self.trainer
        shuffle = role == "train" and not (trainer and trainer.overfit_batches)
        if trainer and share is None:
            share = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        if self._seed is None:  # that of the random numbers of this run, the same in every process
            self._seed = trainer.strategy.broadcast(torch.initial_seed()) if trainer else torch.initial_seed()
        return (EpochSampler if shuffle else InOrder)(rows, self._order_seed, shuffle, share)

    def _order_seed(self) -> int:
        assert self._seed is not None
        return self._seed

    def _ready(self) -> Preparation[Any]:
        if self._prepared is None:
            raise UserError("The data is not set up yet: call setup(stage) first, or let the Trainer do it.")
        return self._prepared
