"""What `media/` promises: a file for each thing and step, by names that stay in the folder, replaced whole."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from streamtrain.callbacks.media_folder import MediaFolder
from streamtrain.errors import EnvironmentProblem
from streamtrain.events import Media, TrainBegin
from streamtrain.media import Image, medium


def shown(folder: Path, *events: Media) -> list[str]:
    callback = MediaFolder()
    callback.on_train_begin(TrainBegin(run_dir=str(folder)))
    for event in events:
        callback.on_media(event)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_each_kind_has_its_file(tmp_path: Path) -> None:
    values = {
        "map": medium(np.zeros((2, 2)), ""),
        "worst": medium([{"row": 3, "loss": 0.5}], ""),
        "weights": medium(np.array([0.0, 1.0, np.inf]), ""),
    }
    files = shown(tmp_path, Media(step=7, values=values))
    names = ["map/step-000000007.png", "weights/step-000000007.json", "worst/step-000000007.json"]
    assert files == [f"media/{name}" for name in names]
    assert json.loads((tmp_path / files[2]).read_text()) == {"columns": ["row", "loss"], "rows": [[3, 0.5]]}
    histogram = json.loads((tmp_path / files[1]).read_text())
    assert (sum(histogram["counts"]), len(histogram["edges"]), histogram["left_out"]) == (2, 65, 1)


def test_a_step_that_is_made_again_has_its_media_once(tmp_path: Path) -> None:
    black, white = (Image.of(np.full((2, 2), grey)) for grey in (0.0, 1.0))
    (file,) = shown(tmp_path, Media(step=1, values={"x": black}), Media(step=1, values={"x": white}))
    assert (tmp_path / file).read_bytes() == white.png()


@pytest.mark.parametrize("name", ["../../outside", "/etc/x", "..", "", "a\0b"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (file,) = shown(tmp_path / "run", Media(values={name: medium(np.zeros(3), "")}))
    assert len(Path(file).parts) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("letter", ["x", "\N{SNOWMAN}a", "\N{GRINNING FACE}"])
def test_a_name_too_long_for_a_file_is_cut_and_stays_its_own(tmp_path: Path, letter: str) -> None:
    """It ended the fit."""
    names = [letter * 300 + end for end in "ab"]
    files = shown(tmp_path, Media(values={name: medium(np.zeros(3), "") for name in names}))
    assert len(files) == 2
    assert all(Path(file).parts[1].startswith(letter * 10) or letter[0] not in "x" for file in files)


def test_a_disk_that_refuses_is_an_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "media").write_text("no folder")
    with pytest.raises(EnvironmentProblem, match=r"media/x/step-000000000\.json can't be written"):
        shown(tmp_path, Media(values={"x": medium(np.zeros(3), "")}))


def test_a_disk_without_room_costs_what_is_logged_then_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, full = Path.write_bytes, {1, 2, 4}

    def half(path: Path, data: bytes) -> int:
        if int(path.name[6:15]) in full:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", half)
    events = [Media(step=step, values={"x": medium(np.zeros(3), "")}) for step in range(6)]
    assert shown(tmp_path, *events) == [f"media/x/step-{step:09d}.json" for step in (0, 3, 5)]
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition(" is left out")[0][-22:] for text in said] == [f"/x/step-{step:09d}.json" for step in (1, 4)]
