"""What weights of elsewhere promise: tensors come in, by the names that the model has; code never runs."""

from __future__ import annotations

import os
import pickle
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamtrain import foreign, tensor_file
from streamtrain.errors import CheckpointError
from streamtrain.foreign import bare


def state() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in nn.Linear(4, 2).state_dict().items()}


def behind(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state().items()}


@pytest.mark.parametrize(
    "saved",
    [
        state(),
        OrderedDict(state()),
        behind("module."),
        behind("_orig_mod."),
        behind("module._orig_mod."),
        {"state_dict": state(), "epoch": 3, "optimizer_states": [{}]},
        {"state_dict": behind("module.")},
        {"model": state(), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        {"model_state_dict": state(), "loss": 0.5},
        {"epoch": 1, "model": {"state_dict": state()}},
    ],
    ids=["plain", "ordered", "ddp", "compiled", "both", "lightning", "ddp-below", "model", "usual", "nested"],
)
def test_weights_are_found_where_others_put_them(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / "m.pt")
    found = foreign.read(tmp_path / "m.pt")
    assert sorted(found) == ["bias", "weight"]
    assert found["weight"].shape == (2, 4)


def test_a_prefix_that_the_model_may_have_itself_goes_only_if_the_model_says_so() -> None:
    wrapped = behind("model.")
    assert bare(wrapped).keys() == {"model.weight", "model.bias"}
    assert bare(wrapped, {"weight", "bias"}).keys() == {"weight", "bias"}
    assert bare(wrapped, {"model.weight", "model.bias"}).keys() == {"model.weight", "model.bias"}


def test_what_a_wrapper_keeps_beside_the_model_does_not_hide_it() -> None:
    beside = {**behind("model."), "loss.scale": torch.ones(1)}
    assert bare(beside).keys() == beside.keys()
    assert bare(beside, {"weight", "bias"}).keys() == {"weight", "bias", "loss.scale"}
    clash = {**behind("model."), "weight": torch.ones(1)}
    assert bare(clash, {"weight", "bias"}).keys() == clash.keys()


def test_other_weights_in_the_file_are_named_as_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"model": state(), "ema": state(), "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "m.pt")
    foreign.read(tmp_path / "m.pt")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'm.pt'}: the weights under 'model' are taken, and left are those of ema"
    ]


def packed(path: Path, bomb: str, data: bytes) -> None:
    """A file of torch.save zipped once more, with an entry of other bytes, over and over."""
    torch.save(state(), path)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, held in entries.items():
            with target.open(name, "w") as file:
                for _ in range(64 if name.endswith(bomb) else 1):
                    file.write(data if name.endswith(bomb) else held)


@pytest.mark.parametrize("bomb", ["data.pkl", "data/0"])
def test_a_zip_that_would_fill_the_memory_is_refused_by_its_directory(tmp_path: Path, bomb: str) -> None:
    packed(tmp_path / "m.pt", bomb, bytes(4 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"m\.pt is not read: it is packed, and its .* bytes would become 268,"):
        foreign.read(tmp_path / "m.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB


def test_a_file_that_was_zipped_again_is_read(tmp_path: Path) -> None:
    packed(tmp_path / "m.pt", "nowhere", b"")
    assert sorted(foreign.read(tmp_path / "m.pt")) == ["bias", "weight"]


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    with open(tmp_path / "m.safetensors", "wb") as file:
        tensor_file.write(lambda data: file.write(data) and None, *tensor_file.plan(behind("module."), {}))
    assert sorted(foreign.read(tmp_path / "m.safetensors")) == ["bias", "weight"]


class Calls:
    """Makes a pickle that calls `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_by_the_name_of_what_it_wants(tmp_path: Path, legacy: bool) -> None:
    path, witness = tmp_path / "m.pt", tmp_path / "ran"
    torch.save({"state_dict": state(), "x": Calls(f"touch {witness}")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"m\.pt is not read: it wants posix\.system, which is no tensor"):
        foreign.read(path)
    assert not witness.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("data", [pickle.dumps(Calls("true")), bytes(100)], ids=["of pickle.dump", "zeros"])
def test_what_no_unpickler_of_weights_reads_brings_no_advice_to_run_it(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.pkl").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"m\.pkl is not read: it is no pickle of tensors alone") as caught:
        foreign.read(tmp_path / "m.pkl")
    assert "weights_only" not in str(caught.value)


def test_a_whole_model_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 2), tmp_path / "m.pt")
    with pytest.raises(
        CheckpointError, match=r"it wants torch\.nn\.modules\.linear\.Linear, which is no tensor"
    ) as caught:
        foreign.read(tmp_path / "m.pt")
    assert "model.state_dict()" in caught.value.hint


@pytest.mark.parametrize("data", [b"", b"\x80\x02.", b"PK\x03\x04", b"text", b"\x80\x02}q\x00."], ids=repr)
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_what_is_no_such_file_is_named(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        foreign.read(tmp_path / name)


def test_a_file_that_was_cut_is_named_at_any_length(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt") as caught:
            foreign.read(tmp_path / "cut.pt")
        assert length < 4 or caught.value.hint == "Was it cut short?"


@pytest.mark.parametrize("saved", [{}, {"epoch": 3}, [torch.zeros(2)], torch.zeros(2), {"model": {}}], ids=str)
def test_a_file_without_weights_by_name_says_what_it_holds(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="holds no weights by name: it holds "):
        foreign.read(tmp_path / "m.pt")
