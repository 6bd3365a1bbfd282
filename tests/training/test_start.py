"""A run is checked whole before it starts, and a start that fails leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image
from support import contents, tiny_config, tiny_settings

from ncsr_fast import NCSR
from ncsr_fast.training import OtherProcessFailed, TrainingStopped, train
from ncsr_fast.training.processes import Processes


@pytest.fixture
def settings(photos):
    return tiny_settings(photos)


def refused(settings, run, *errors) -> str:
    """What is said of a start that fails; the folder of the run, if it was there, is as it was."""
    before = contents(run)
    with pytest.raises(errors or (ValueError, OSError)) as caught:
        train(settings, run, "cpu")
    assert contents(run) == before
    return str(caught.value)


def no_folder(tmp_path):
    return {"validation": "no_such_folder"}, r"^validation: there is no 'no_such_folder'; relative paths are relative to"


def no_image(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.png").touch()
    return {
        "validation": str(tmp_path / "v")
    }, "^validation: cannot read image '.*a.png': it is not an image.*; remove or correct"


def too_small(tmp_path):
    (tmp_path / "v").mkdir()
    Image.new("RGB", (7, 40)).save(tmp_path / "v" / "a.png")
    return {"validation": str(tmp_path / "v")}, "^validation: '.*a.png' is 40×7, smaller than 8×8"


def other_lr(tmp_path):
    shutil.copytree(tmp_path / "photos", tmp_path / "lr")
    given = {"validation": str(tmp_path / "photos"), "validation_lr": str(tmp_path / "lr")}
    return given, r"^validation: '.*lr/a.png' is 96×120, not 1/4 of its HR image's 96×120; .*b.png.*c.png"


def no_images(tmp_path):
    return {"images": ("none",)}, "^images: there is no 'none'"


def pattern(tmp_path):
    return {"images": (str(tmp_path / "photos" / "*.png"),)}, r"^images: '.*\*.png' is a pattern.*give the folder, '.*photos'"


def one_image(tmp_path):
    return {"images": (str(tmp_path / "photos" / "a.png"),)}, "^images: '.*a.png' is one image; give a folder.*photos'"


def another_file(tmp_path):
    (tmp_path / "a.txt").touch()
    return {"images": (str(tmp_path / "a.txt"),)}, "^images: '.*a.txt' is neither a folder of images nor a .pklv4 file"


def inside(tmp_path):
    return {"images": (str(tmp_path),)}, "the run's folder '.*run' is inside images '.*', so that its samples would be"


def no_model(tmp_path):
    return {"start_from": "none/there.pth"}, "no model at 'none/there.pth'"


def other_encoder(tmp_path):
    NCSR(tiny_config(blocks=3)).encoder.save_pretrained(tmp_path / "encoder")
    return {"encoder_weights": str(tmp_path / "encoder")}, "does not fit this encoder"


def degradation(tmp_path):
    (tmp_path / "halves.py").write_text("def half(hr, scale, generator): return hr[:, ::2, ::2]\n")
    return {"degradation": "halves:half"}, r"degradation 'halves:half' must return a uint8 tensor of shape \(3, 8, 8\)"


def graph(tmp_path):
    return {"graph": True}, "^graph: CUDA graphs need a GPU, but the device is 'cpu'"


@pytest.mark.parametrize(
    "trouble",
    [no_folder, no_image, too_small, other_lr, no_images, pattern, one_image, another_file, inside, no_model, other_encoder,
     degradation, graph],
)  # fmt: skip
def test_settings_that_cannot_work(settings, tmp_path, monkeypatch, trouble):
    monkeypatch.chdir(tmp_path)
    changes, message = trouble(tmp_path)
    said = refused(replace(settings, **changes), tmp_path / "deep" / "run")
    assert re.search(message, said), said
    assert not (tmp_path / "deep").exists()


def test_all_that_is_wrong_is_said_at_once(settings, tmp_path):
    settings = replace(settings, images=("here",), validation="there", start_from="nowhere")
    lines = refused(settings, tmp_path / "run", ValueError).splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "images: there is no 'here'", "validation: there is no 'there'", "no model at 'nowhere'",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_used(settings, tmp_path, monkeypatch):
    (tmp_path / "run").touch()
    assert "run' is a file, but a run needs a folder" in refused(settings, tmp_path / "run", NotADirectoryError)
    assert "cannot be written to: Not a directory" in refused(settings, tmp_path / "run" / "deep", OSError)
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mine" / "settings.json").write_text(json.dumps(settings.to_dict()))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "mine" / "checkpoints")
    assert "checkpoints' cannot be written to; change its permissions" in refused(settings, tmp_path / "mine", PermissionError)


def test_a_disk_without_room_for_a_checkpoint(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert "has 0 MiB free, but a checkpoint takes" in refused(settings, tmp_path / "run", OSError)


def test_without_tensorboard(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install 'ncsr_fast[train]'" in refused(replace(settings, tensorboard=True), tmp_path / "run", ImportError)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts(settings, tmp_path, monkeypatch, number):
    """Even where the code that it interrupts takes the exception for one of its own."""
    from ncsr_fast.training import start

    def interrupted(crops):
        try:
            os.kill(os.getpid(), number)
        except BaseException:  # noqa: BLE001
            return {"images": [], "left_out": {}}

    monkeypatch.setattr(start, "data_record", interrupted)
    said = refused(settings, tmp_path / "run", TrainingStopped)
    assert said == f"stopped by signal {int(number)} before the first step; nothing was written"


@pytest.mark.parametrize("reader", ["exif_transpose", "image_size", "read_checkpoint", "pickle"])
def test_a_signal_as_files_are_read(settings, photos, tmp_path, monkeypatch, reader):
    """It is not taken for damage of the file, whatever the reader catches."""

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    if reader == "exif_transpose":
        monkeypatch.setattr("PIL.ImageOps.exif_transpose", interrupted)
    elif reader == "image_size":
        monkeypatch.setattr("ncsr_fast.data.images._size", interrupted)
    elif reader == "read_checkpoint":
        torch.save({}, tmp_path / "start.pth")
        settings = replace(settings, start_from=str(tmp_path / "start.pth"))
        monkeypatch.setattr(torch, "load", interrupted)
    else:
        (tmp_path / "a.pklv4").write_bytes(b"")
        settings = replace(settings, images=(str(tmp_path / "a.pklv4"),))
        monkeypatch.setattr("ncsr_fast.data.pickled._Unpickler", interrupted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = refused(settings, tmp_path / "run", TrainingStopped)
    assert said == f"stopped by signal {int(signal.SIGTERM)} before the first step; nothing was written"


class OneOfThree(Processes):
    """The second of three processes, whose calls raise `messages`."""

    messages: tuple

    def gathered(self, value):
        assert value == self.messages[1]
        return list(self.messages)


@pytest.mark.parametrize(
    "messages, error",
    [
        ((None, "mine", None), ValueError),
        ((None, "mine", "mine"), ValueError),
        (("mine", "mine", "mine"), OtherProcessFailed),
        ((None, None, "theirs"), OtherProcessFailed),
        (("theirs", "mine", None), ValueError),
    ],
)
def test_an_error_is_raised_in_all_processes_and_said_once(messages, error):
    def call():
        if messages[1]:
            raise ValueError(messages[1])

    one = OneOfThree(torch.device("cpu"), 1, 3)
    object.__setattr__(one, "messages", messages)
    with pytest.raises(error):
        one.together(call)


def test_more_workers_than_a_machine_can_start(settings, tmp_path):
    most = 8 * os.cpu_count()
    said = refused(replace(settings, workers=most + 1), tmp_path / "run", ValueError)
    assert said == f"workers: {most + 1} processes are too many for {os.cpu_count()} processors; at most {most}"


def test_a_batch_that_the_processes_cannot_share(settings, tmp_path):
    from ncsr_fast.training.start import prepared

    with pytest.raises(ValueError, match="batch must be a multiple of the number of processes, 3, which share it, not 2"):
        prepared(settings, tmp_path / "run", Processes(torch.device("cpu"), 0, 3))
