"""metrics.csv: nothing of it is lost by new columns, by a cut, or by a program that is killed."""

import csv
import resource
import shutil
from pathlib import Path

import pytest

from peftlight.callbacks.metrics_file import MetricsFile
from peftlight.errors import UserError
from tasks.small import quiet_trainer


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_row_is_in_the_file_at_once_and_a_new_metric_gets_its_column(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log_metrics({"loss": 0.5}, 0)
    assert rows(tmp_path) == [{"loss": "0.5", "step": "0"}]
    file.log_metrics({"loss": 0.25}, 1)
    file.log_metrics({"accuracy": 1.0}, 1)
    assert rows(tmp_path) == [
        {"accuracy": "", "loss": "0.5", "step": "0"},
        {"accuracy": "", "loss": "0.25", "step": "1"},
        {"accuracy": "1.0", "loss": "", "step": "1"},
    ]
    assert file.rows == 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_it_goes_on_after_the_rows_that_a_checkpoint_counted(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step in range(5):
        file.log_metrics({"loss": float(step)}, step)
    with open(tmp_path / "metrics.csv", "a") as torn:
        torn.write("3.")
    again = MetricsFile(tmp_path)
    quiet_trainer(tmp_path, logger=again)  # Lightning looks at its loggers; this one keeps the file
    again.cut(3)
    assert (again.rows, again.last_step) == (3, 2)
    again.log_metrics({"loss": 9.0}, 3)
    assert [row["loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "9.0"]


def test_a_row_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step in range(3):
        file.log_metrics({"loss": float(step)}, step)
    (tmp_path / "metrics.csv").write_bytes((tmp_path / "metrics.csv").read_bytes()[:-4])
    again = MetricsFile(tmp_path)
    again.cut(3)
    again.log_metrics({"loss": 9.0}, 3)
    assert [row["loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "9.0"]
    assert again.rows == 3


def test_a_file_that_is_gone_begins_anew_with_its_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = MetricsFile(tmp_path / "run")
    for step in range(5):
        if step == 3:
            shutil.rmtree(tmp_path / "run")
        file.log_metrics({"loss": float(step)}, step)
    assert rows(tmp_path / "run") == [{"loss": "3.0", "step": "3"}, {"loss": "4.0", "step": "4"}]
    assert file.rows == 2
    assert capsys.readouterr().out.count("metrics.csv is gone") == 1


def test_without_room_the_file_is_named(tmp_path: Path) -> None:
    file, limits = MetricsFile(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    file.log_metrics({"loss": 0.5}, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"No room left to write .*metrics\.csv"):
            file.log_metrics({"loss": 0.25}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_nothing_is_cut_where_there_is_less(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.cut(3)
    assert (file.rows, list(tmp_path.iterdir())) == (0, [])
    assert (file.save_dir, file.name, file.version) == (str(tmp_path.parent), "", tmp_path.name)
