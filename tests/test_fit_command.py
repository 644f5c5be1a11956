"""What `fit` promises around the training: where it goes, what it refuses to mix, what it logs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from streamtrain.config import resolve
from streamtrain.config_tables import Config
from streamtrain.errors import CheckpointError, ConfigError
from streamtrain.fit_command import default_folder, in_folder, log_level, refuse_other_run
from streamtrain.log_file import logged
from streamtrain.said import Said


def config(**tables: Any) -> tuple[Config, Said]:
    said = Said({"data": {"store": "era5.zarr"}, "model": "m:N", **tables})
    return resolve(said), said


def test_a_run_goes_to_a_folder_named_after_the_data_and_the_time(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = default_folder(*config())
    assert re.fullmatch(r"runs/era5-\d{8}-\d{6}", folder)
    Path(folder).mkdir(parents=True)
    assert default_folder(*config()) != folder


def test_a_configuration_file_names_its_runs() -> None:
    made, said = config()
    said.file = "experiments/rain today.toml"
    assert default_folder(made, said).startswith("runs/rain-today-")


def test_a_folder_that_was_asked_for_is_taken_and_a_trial_has_none() -> None:
    assert in_folder(*config(trainer={"run_dir": "r"})).trainer.run_dir == "r"
    assert in_folder(*config(trainer={"fast_dev_run": True})).trainer.run_dir is None


def test_a_kept_configuration_stands_for_its_folder_unless_another_is_asked_for(tmp_path: Path) -> None:
    made, said = config(trainer={"run_dir": "old"})
    said.file = str(tmp_path / "config.toml")
    assert in_folder(made, said).trainer.run_dir == "old"
    (tmp_path / "checkpoints").mkdir()
    assert in_folder(made, said).trainer.run_dir == str(tmp_path)
    said.assign("--run-dir", "trainer.run_dir", "new")
    assert in_folder(resolve(said), said).trainer.run_dir == "new"


def kept(folder: Path, made: Config) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(made.dumps())


def test_a_folder_of_the_same_configuration_is_gone_on_with(tmp_path: Path) -> None:
    made, _ = config()
    refuse_other_run(made, str(tmp_path))
    kept(tmp_path, made)
    refuse_other_run(made, str(tmp_path))
    refuse_other_run(config(fit={"max_epochs": 9})[0], str(tmp_path))


def test_a_folder_of_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    kept(tmp_path, config()[0])
    with pytest.raises(ConfigError, match=r"was made with another configuration: trainer\.seed: unset -> 5$"):
        refuse_other_run(config(trainer={"seed": 5})[0], str(tmp_path))


def test_checkpoints_of_another_configuration_are_not_resumed(tmp_path: Path) -> None:
    kept(tmp_path, config()[0])
    (tmp_path / "checkpoints" / "step-000000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"belong to another configuration: data\.seed: 0 -> 3$"):
        refuse_other_run(config(data={"store": "d", "seed": 3}, fit={"resume": "auto"})[0], str(tmp_path))


def test_a_configuration_of_another_version_is_compared_by_what_both_know(tmp_path: Path) -> None:
    made, _ = config()
    (tmp_path / "config.toml").write_text(made.dumps() + "[novel]\nkey = 1\n")
    with pytest.raises(ConfigError, match=r"novel\.key: 1 -> unset$"):
        refuse_other_run(made, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "quiet", "verbose", "level"),
    [
        (None, False, False, logging.INFO),
        (None, True, False, logging.WARNING),
        (None, False, True, logging.DEBUG),
        ("ERROR", True, True, logging.ERROR),
    ],
)
def test_the_level_of_what_is_said(name: str | None, quiet: bool, verbose: bool, level: int) -> None:
    assert log_level(name, quiet=quiet, verbose=verbose) == level


def test_the_log_keeps_what_was_said_before_its_folder_was_there(tmp_path: Path, capsys: Any) -> None:
    ours = logging.getLogger("streamtrain.test")
    with logged(logging.INFO) as log:
        ours.info("before %d", 1)
        log.open(tmp_path)
        try:
            raise ValueError("why")
        except ValueError:
            ours.exception("after")
    ours.warning("when nobody listens")
    text = (tmp_path / "log.txt").read_text()
    assert "INFO streamtrain.test: before 1\n" in text
    assert "Traceback" in text
    assert capsys.readouterr().err == "note: before 1\nwarning: after (ValueError: why)\n"


def test_logging_is_as_it_was_afterwards() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, logging.getLogger("streamtrain").level)
    with logged(logging.DEBUG):
        assert len(root.handlers) == len(before[0]) + 2
    assert (list(root.handlers), root.level, logging.getLogger("streamtrain").level) == before
