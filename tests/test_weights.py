"""Tensors that are no weights, and configurations that are none, are refused by name wherever a model is read or written."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file
from support import tiny_model

from ncsr_fast import NCSR, RRDB, CheckpointError
from ncsr_fast.cli.main import main
from ncsr_fast.convert import convert
from ncsr_fast.files import read_json

WEIGHTS = {
    "int32": (lambda tensor: (tensor * 100).int(), "of int32"),
    "complex64": (lambda tensor: tensor.to(torch.complex64), "of complex64"),
    "sparse": (torch.Tensor.to_sparse, "not dense"),
    "meta": (lambda tensor: tensor.to("meta"), "without values (on the meta device)"),
    "quantized": (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "quantized"),
}
READERS = {
    "generator": lambda path: RRDB.from_pretrained(path),
    "flow": lambda path: NCSR.from_pretrained(path, tiny_model().config),
    "convert": lambda path: convert(path, path.with_name("out")),
    "encoder": lambda path: RRDB(4, 4, 2, 2, long_skip="last_block").load_published(torch.load(path)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's about quantized tensors
def test_tensors_of_other_kinds(tmp_path, kind, reader, every):
    change, words = WEIGHTS[kind]
    model = tiny_model(dtype=torch.float32)
    state = (model if reader == "flow" else model.encoder).published_state_dict()
    name = next(name for name in state if name.endswith("conv_last.weight"))
    torch.save({key: change(value) if every or key == name else value for key, value in state.items()}, tmp_path / "net.pth")
    count = len(state) if every else 1
    with pytest.raises(CheckpointError, match=rf"holds tensors that are not weights, {count} {re.escape(words)}: ") as caught:
        READERS[reader](tmp_path / "net.pth")
    assert "\n" not in str(caught.value) and name in caught.value.problems[words]
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_weights_of_other_kinds_in_a_directory(tmp_path):
    for model, reader in ((tiny_model(), NCSR), (tiny_model().encoder, RRDB)):
        model.save_pretrained(tmp_path)
        save_file({name: tensor.long() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
        with pytest.raises(
            CheckpointError, match="model.safetensors' holds tensors that are not weights, .* of int64: .*weight"
        ):
            reader.from_pretrained(tmp_path)
        torch.save([1], tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="model.safetensors' does not hold a state dict"):
            reader.from_pretrained(tmp_path)


def flat(state):
    return {key: value.flatten() for key, value in state.items()}


def numbers(state):
    return {key: torch.tensor(1.0) for key in state}


def empty(state):
    return {key: value[:0] for key, value in state.items()}


@pytest.mark.parametrize("change", [flat, numbers, empty])
@pytest.mark.parametrize("place", ["RRDB_trunk.0.RDB1.conv1.weight", "conv_first.weight", "conv_last.weight"])
def test_shapes_of_no_convolution(tmp_path, change, place):
    state = tiny_model().encoder.published_state_dict()
    torch.save({**state, place: change(state)[place]}, tmp_path / "net.pth")
    said = rf"does not fit an RRDB generator; 1 of the wrong shape: {re.escape(place)} \(.*\), expected that of a convolution's"
    with pytest.raises(CheckpointError, match=said):
        RRDB.from_pretrained(tmp_path / "net.pth")


@pytest.mark.parametrize("wrapped", [False, True])
def test_names_that_are_no_text(tmp_path, wrapped, capsys):
    state = {1: torch.ones(3), "a": torch.ones(3)}
    torch.save({"params": state} if wrapped else state, tmp_path / "net.pth")
    assert main(["convert", str(tmp_path / "net.pth"), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "net.pth' holds tensors under keys that are not texts: 1" in err and err.count("\n") == 1


def test_a_layer_number_without_bound(tmp_path):
    """ESRGAN's old names count layers; a file with a large number is not as many layers long."""
    state = {"model.1.sub.0.RDB1.conv1.0.weight": torch.ones(2, 4, 3, 3), f"model.{10**12}.weight": torch.ones(3)}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="missing"):
        RRDB.from_pretrained(tmp_path / "net.pth")


@pytest.mark.parametrize(
    "text, said",
    [
        ("[]", r"it should be an object of names and values, not \[\]"),
        ("5", "it should be an object of names and values, not 5"),
        ("[" * 100_000, "its lists or objects are nested too deeply"),
        ("{", "Expecting property name"),
    ],
)
def test_configurations_that_are_none(tmp_path, capsys, text, said):
    tiny_model().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(text)
    for reader in (NCSR, RRDB):
        with pytest.raises(CheckpointError, match=f"config.json' is not the configuration of an (ncsr|rrdb) model: {said}"):
            reader.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=said):
        read_json(tmp_path / "m" / "config.json")
    assert main(["convert", str(tmp_path / "m"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("part", ["encoder", "flow"])
def test_a_model_without_values_is_not_written(tmp_path, part):
    with torch.device("meta"):
        model = NCSR(tiny_model().config)
    model = model.encoder if part == "encoder" else model
    with pytest.raises(
        ValueError, match=r"a model on the meta device cannot be written, \d+ without values: .*: give the model weights first"
    ):
        model.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.rglob("*.*"))
