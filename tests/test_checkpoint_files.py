"""What is said of files that are given in place of a checkpoint, wherever one is read; and of weights that are not finite."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import tiny_model, tiny_settings

from ncsr_fast import NCSR, RRDB, CheckpointError
from ncsr_fast.convert import convert
from ncsr_fast.files import read_checkpoint
from ncsr_fast.training.run import Run


class Command:
    """Unpickles as a command of the shell."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def pickled(protocol: int):
    def write(path):
        path.write_bytes(pickle.dumps({"a": Command(path.with_name("trace"))}, protocol=protocol))

    return write


def content(data: bytes):
    return lambda path: path.write_bytes(data)


def cut_checkpoint(path):
    torch.save({"weight": torch.zeros(9999)}, path)
    path.write_bytes(path.read_bytes()[:9999])


def damaged_checkpoint(path):
    """An old one, without its last tensor."""
    torch.save({"weight": torch.zeros(9)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-5])


def cut_safetensors(path):
    save_file({"weight": torch.zeros(9)}, path)
    path.write_bytes(path.read_bytes()[:-5])


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inner/network.pth", "")


def numpy_archive(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(2))


def numpy_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(2))


FILES = {
    "web-page": (content(b"\n<!DOCTYPE html><html><head>Virus scan warning"), "it is a web page; .* save the file itself"),
    "lfs-pointer": (
        content(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "it is a Git LFS pointer, .* `git lfs pull`",
    ),
    "text": (content(b"Access denied\n"), "it is a text that begins with 'Access denied'"),
    "json": (content(b'{"error": "not found"}'), """it is a text that begins with '{"error": "not found"}'"""),
    "empty": (content(b""), r"it is empty \(0 bytes\): download or save it again"),
    "pickle-2": (pickled(2), r"it holds a (posix|nt).system, which is more than tensors and is not executed"),
    "pickle-4": (pickled(4), r"it holds a (posix|nt).system, which is more than tensors and is not executed"),
    "pickle-in-zip": (
        lambda path: torch.save({"a": Command(path.with_name("trace"))}, path),
        r"it holds a (posix|nt).system, which is more than tensors and is not executed; save only the network's state_dict\(\)",
    ),
    "whole-module": (
        lambda path: torch.save(torch.nn.Linear(1, 1), path),
        "it holds a torch.nn.modules.linear.Linear, which is more than tensors and is not executed",
    ),
    "pickle-of-numbers": (
        lambda path: path.write_bytes(pickle.dumps({1, 2}, protocol=4)),
        "it was not written by torch.save or safetensors, or is corrupt",
    ),
    "torchscript": (
        lambda path: torch.jit.script(torch.nn.Linear(1, 1)).save(str(path)),
        r"it is a TorchScript program, .* torch.save\(torch.jit.load\(file\).state_dict\(\)",
    ),
    "zip": (zipped, r"it is a zip archive \(inner/network.pth\): unpack it"),
    "gzip": (content(b"\x1f\x8b\x08\x00\x00\x00"), "it is a gzip archive: unpack it"),
    "cut": (cut_checkpoint, "it is a truncated archive, .* download or copy it again"),
    "damaged": (damaged_checkpoint, r"it is truncated or corrupt \(.*\): download or save it again"),
    "cut-safetensors": (cut_safetensors, r"it is truncated or corrupt \(.*\): download or save it again"),
    "numpy": (numpy_array, "it is a NumPy array: give the PyTorch checkpoint that it was made from"),
    "npz": (numpy_archive, r"it is an archive of NumPy arrays \(.npz\): give the PyTorch checkpoint"),
    "onnx": (content(b"\x08\x0a\x12\x07pytorch\x1a\x052.0.0"), "it is an ONNX graph: give the PyTorch checkpoint"),
    "image": (lambda path: Image.new("RGB", (2, 2)).save(path, "PNG"), "it is a PNG image: give the model's file"),
    "noise": (content(bytes(range(200, 256)) * 9), "it was not written by torch.save or safetensors, or is corrupt"),
}


def in_a_directory(path):
    folder = tiny_model().save_pretrained(path.with_name("folder"))
    shutil.copyfile(path, folder / "model.safetensors")
    return NCSR.from_pretrained(folder)


READERS = {
    "NCSR": NCSR.from_pretrained,
    "RRDB": RRDB.from_pretrained,
    "load_published": lambda path: tiny_model().load_published(path),
    "convert": lambda path: convert(path, path.with_name("out")),
    "directory": in_a_directory,
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_checkpoint(tmp_path, kind):
    """Each is named, what to do is said, in one line, and never to let the file run code; nothing in it is run."""
    write, message = FILES[kind]
    path = tmp_path / "given.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of pickles and TorchScript
        write(path)
        for reader in READERS.values():
            with pytest.raises(
                CheckpointError, match=f"(given.pth|model.safetensors)' is not a readable checkpoint: {message}"
            ) as caught:
                reader(path)
            assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists() and not (tmp_path / "out").exists()


def test_a_safetensors_file_of_another_name(tmp_path):
    """What a file holds decides, not how it is called."""
    save_file({"weight": torch.ones(2)}, tmp_path / "a.pth")
    torch.save({"weight": torch.ones(2)}, tmp_path / "b.safetensors")
    assert all(torch.equal(read_checkpoint(tmp_path / name)["weight"], torch.ones(2)) for name in ("a.pth", "b.safetensors"))


def test_folders_that_are_no_model(tmp_path):
    model, folder = tiny_model(), tmp_path / "run"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="run' has no config.json; a model directory is written by save_pretrained"):
        NCSR.from_pretrained(folder)
    torch.save(model.published_state_dict(), folder / "5_G.pth")
    with pytest.raises(FileNotFoundError, match="has no config.json; give a checkpoint in it, such as '.*5_G.pth'"):
        NCSR.from_pretrained(folder)
    model.save_pretrained(folder / "model")
    with pytest.raises(FileNotFoundError, match="has no config.json; give the model in it, '.*model'"):
        NCSR.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="run' is a folder, not a checkpoint file; give the model in it, '.*model'"):
        model.load_published(folder)


BROKEN = "levels.0.split_bias"


def broken_model(value: float) -> NCSR:
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter(BROKEN)[0] = value
        model.encoder.conv_last.weight[0] = value
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    model = broken_model(value)
    torch.save(model.published_state_dict(), tmp_path / "net.pth")
    named = (
        r"net.pth' has NaN or infinite values, 2 not finite: RRDB.conv_last.weight, flowUpsamplerNet.layers.\d+.conv.bias: the"
    )
    for reader in READERS.values():
        if reader is not in_a_directory:
            with pytest.raises(CheckpointError, match=named) as caught:
                reader(tmp_path / "net.pth")
    assert list(caught.value.problems) == ["not finite"] and not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="the checkpoint has NaN or infinite values, 2 not finite"):
        tiny_model().load_published(model.published_state_dict())
    for saved, reader in ((model, NCSR), (model.encoder, RRDB)):
        saved.save_pretrained(tmp_path / "folder")
        with pytest.raises(
            CheckpointError, match="model.safetensors' has NaN or infinite values, .* not finite: .*conv_last.weight"
        ):
            reader.from_pretrained(tmp_path / "folder")


def test_resuming_passes_over_weights_that_are_not_finite(tmp_path, photos):
    run = Run(tmp_path, replace(tiny_settings(photos), keep=5))
    rest = {"stage": "flow", "optimizer": {}, "counters": {}, "rate": 1.0, "best": None}
    for step, model in ((1, tiny_model()), (2, broken_model(torch.nan))):
        run.save("flow", step, {**rest, "step": step, "model": model.state_dict()})
    with pytest.warns(UserWarning, match="flow-00000002.pt' is damaged and is not used: its model has NaN or infinite values"):
        assert run.latest("flow", tiny_model())["step"] == 1
