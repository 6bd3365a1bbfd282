"""save_pretrained and from_pretrained, damaged directories, and the models that are shipped."""

from __future__ import annotations

import json

import pytest
import torch
from layouts import LAYOUTS, laid_out
from support import full_disk, image, tiny_model

from ncsr_fast import NCSR, RRDB, CheckpointError, NCSRConfig, files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_save_and_load(tmp_path, dtype):
    model = tiny_model(dtype=dtype)
    model.initialize(image(2, 3, 8, 8, dtype=dtype), image(2, 3, 2, 2, dtype=dtype))
    directory = model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    again = NCSR.from_pretrained(directory)
    assert again.config == model.config
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_any_layout(tmp_path, layout):
    """A file holds their values, whatever memory they lie in."""
    model = tiny_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data = laid_out(parameter.data, layout)
    model.save_pretrained(tmp_path / "model")
    again = NCSR.from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_save_and_load_a_generator(tmp_path):
    encoder = tiny_model(dtype=torch.float32).encoder
    encoder.save_pretrained(tmp_path)
    again = RRDB.from_pretrained(tmp_path)
    assert again.configuration() == encoder.configuration()
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in again.state_dict().items())
    with pytest.raises(CheckpointError, match="is not the configuration of an ncsr model: its model_type is not 'ncsr'"):
        NCSR.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model at"):
        RRDB.from_pretrained(tmp_path / "nothing")


def test_saving_over_a_model_replaces_it(tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path)
    second = tiny_model(seed=2)
    second.save_pretrained(tmp_path)
    assert torch.equal(NCSR.from_pretrained(tmp_path).levels[0].invconv, second.levels[0].invconv)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError), files.atomic_write(target) as path:
        path.write_text("half of it")
        raise RuntimeError
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def damage_weights(directory):
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])


def other_weights(directory):
    tiny_model(blocks=3).save_pretrained(directory / "other")
    (directory / "other" / "model.safetensors").rename(directory / "model.safetensors")


def edit_config(**changes):
    def edit(directory):
        values = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(values))

    return edit


DAMAGE = {
    "truncated-weights": (
        damage_weights,
        CheckpointError,
        "model.safetensors' is not a readable checkpoint: it is truncated or corrupt",
    ),
    "other-weights": (other_weights, CheckpointError, r"unexpected: encoder.body.2.rdb1.conv1"),
    "text-config": (
        lambda d: (d / "config.json").write_text("{"),
        CheckpointError,
        "config.json' is not the configuration of an ncsr model",
    ),
    "list-config": (
        lambda d: (d / "config.json").write_text("[]"),
        CheckpointError,
        "is not the configuration of an ncsr model",
    ),
    "other-type": (edit_config(model_type="bert"), CheckpointError, "its model_type is not 'ncsr'"),
    "unknown-key": (edit_config(depth=1), CheckpointError, "unknown configuration key 'depth'"),
    "no-weights": (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "has no model.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_directories(tmp_path, name):
    damage, error, message = DAMAGE[name]
    tiny_model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        NCSR.from_pretrained(tmp_path)


def test_paths_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at .*shipped models: llflow-compact, ncsr-compact-x4"):
        NCSR.from_pretrained(tmp_path / "nothing")
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config belongs to a file"):
        NCSR.from_pretrained(tmp_path, config=tiny_model().config)


@pytest.mark.parametrize("name, most", [("ncsr-compact-x4", 15e6), ("llflow-compact", 3.2e6)])
def test_the_shipped_models(name, most):
    """They are inside the installed package, small, initialised, and come with their cards and licence terms."""
    model = NCSR.from_pretrained(name)
    assert model.config == NCSRConfig.preset(name)
    assert model.actnorm_initialized
    folder = files.SHIPPED / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= most
    assert "Berkeley Segmentation" in (folder / "README.md").read_text()


def test_errors_of_writing_name_the_file(tmp_path):
    """Those of a full disk name none by themselves, others the temporary one; nothing is left behind."""
    with full_disk(), pytest.raises(OSError, match="File too large: '.*x.bin'"), files.atomic_write(tmp_path / "x.bin") as path:
        path.write_bytes(b"x" * 1000)
    with pytest.raises(IsADirectoryError, match=f"Is a directory: '{tmp_path}'"), files.atomic_write(tmp_path) as path:
        path.write_bytes(b"x")
    with pytest.raises(OSError, match=f"File name too long: '{tmp_path}/nnn"), files.atomic_write(tmp_path / ("n" * 300)):
        pass
    with pytest.raises(FileNotFoundError, match="'absent'"), files.atomic_write(tmp_path / "x.bin"):
        open("absent").close()
    assert not list(tmp_path.iterdir())


def test_the_longest_name_a_file_can_have(tmp_path):
    with files.atomic_write(tmp_path / ("n" * 255)) as path:
        path.write_text("x")
    assert (tmp_path / ("n" * 255)).read_text() == "x"
