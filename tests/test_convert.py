"""Checkpoints from one kind of file to another: nothing lost, everything named, all or nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from operator_cases import marked
from safetensors.torch import load_file
from support import assert_same_weights, full_disk, tiny_model

from ncsr_fast import NCSR, RRDB, CheckpointError, files
from ncsr_fast.cli.main import main
from ncsr_fast.convert import convert


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model():
    model = tiny_model(dtype=torch.float32)
    model.actnorm_initialized.fill_(True)
    return model


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    alike = first.keys() == second.keys() and all(first[name].dtype == second[name].dtype for name in first)
    return alike and all(torch.equal(first[name], second[name]) for name in first)


@marked("slow", lambda dtype: dtype != torch.float32)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_every_kind_of_file_into_every_other(model, dtype):
    published = {name: tensor.to(dtype) for name, tensor in model.published_state_dict().items()}
    torch.save(published, "a.pth")
    convert("a.pth", "b.safetensors", model.config)
    assert same(load_file("b.safetensors"), published)
    convert("b.safetensors", "c", model.config)
    assert_same_weights(model.to(dtype), NCSR.from_pretrained("c"))
    convert("c", "d")
    report = convert("d", "e.pth")
    back = torch.load("e.pth", weights_only=True)
    assert list(back) == list(published)
    assert same({n: back[n] for n in back if n not in report.zeros}, {n: published[n] for n in back if n not in report.zeros})
    assert report.zeros and not any(back[name].any() for name in report.zeros)


def test_the_report_names_every_tensor(model):
    state = {f"module.{name}": tensor for name, tensor in model.published_state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": []}, "training.ckpt")
    Path("net.pth").write_bytes(Path("training.ckpt").read_bytes())
    report = convert("net.pth", "model", model.config)
    assert [old for old, _ in report.tensors] == [f"state_dict/{name}" for name in state]
    own = NCSR.from_pretrained("model").state_dict()
    for old, new in report.tensors:
        if new is None:
            assert "flowUpsamplerNet.f." in old or "layers.2.affine.fAffine_std" in old
            continue
        name, _, index = new.partition("[")
        tensor = own[name][int(index[:-1])] if index else own[name]
        assert torch.equal(tensor.flatten(), state[old.removeprefix("state_dict/")].flatten()), (old, new)
    assert len(report.dropped) == 2 + 9 and len(report.renamed) == len(state) - 11
    assert report.report().count("\n") == len(state) - 1
    assert "11 dropped, which no computation uses" in report.summary()


def test_a_checkpoint_of_a_training_run(model):
    Path("run/checkpoints").mkdir(parents=True)
    state = {"stage": "flow", "step": 3, "model": model.state_dict(), "optimizer": {}, "generator": torch.zeros(2)}
    torch.save(state, "run/checkpoints/flow-00000003.pt")
    with pytest.raises(
        CheckpointError, match="has the tensors of this package, but .*settings.json', which describes the model, is missing"
    ):
        convert("run/checkpoints/flow-00000003.pt", "model")
    Path("run/settings.json").write_text(json.dumps({"model": model.config.to_dict(), "batch": 1}))
    convert("run/checkpoints/flow-00000003.pt", "model")
    assert_same_weights(model, NCSR.from_pretrained("model"))
    assert_same_weights(model, NCSR.from_pretrained("run/checkpoints/flow-00000003.pt"))


def test_a_generator(model):
    names = [name for name, _ in model.encoder.published_state_dict().items()]
    assert names[0] == "conv_first.weight"
    state = {f"module.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    state = {name.replace("conv_up.1", "conv_up2").replace("conv_up.0", "conv_up1"): value for name, value in state.items()}
    torch.save({"params": {}, "params_ema": state}, "esrgan.pth")
    report = convert("esrgan.pth", "generator")
    assert ("params_ema/module.conv_up1.weight", "conv_up.0.weight") in report.renamed and len(report.renamed) == len(state)
    encoder = RRDB.from_pretrained("generator")
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), model.encoder.parameters(), strict=True))
    convert("generator", "back.pth")
    assert same(torch.load("back.pth", weights_only=True), model.encoder.published_state_dict())
    with pytest.raises(ValueError, match="config belongs to a flow; 'back.pth' is a generator"):
        convert("back.pth", "other", model.config)


def test_the_long_skip_of_a_generator(model):
    """A file of weights does not have it, a directory does; the summary says which it is."""
    torch.save(model.encoder.published_state_dict(), "rrdb.pth")
    for asked, expected in ((None, "conv_first"), ("last_block", "last_block")):
        report = convert("rrdb.pth", "generator", long_skip=asked)
        assert f"long skip from {expected}: " in report.summary()
        assert RRDB.from_pretrained("generator").long_skip == expected
    assert main(["convert", "rrdb.pth", "--out", "by_command", "--long-skip", "last_block"]) == 0
    assert RRDB.from_pretrained("by_command").long_skip == "last_block"
    torch.save(model.published_state_dict(), "flow.pth")
    model.save_pretrained("flow")
    for source in ("flow.pth", "flow"):
        with pytest.raises(ValueError, match=f"long_skip belongs to a generator; '{source}' is a flow"):
            convert(source, "out", model.config if source == "flow.pth" else None, long_skip="last_block")


def test_a_generator_as_its_own_program_reads_it(model):
    """BasicSR looks for its names under "params"; ESRGAN+ has the names of ESRGAN's old architecture."""
    for options, wrapper, name in (
        ({"scale": 2, "unshuffle": 2}, "params", "body.0.rdb1.conv1.weight"),
        ({"dense_residual": True}, None, "model.1.sub.0.RDB1.conv1x1.weight"),
    ):
        generator = RRDB(channels=4, growth=2, blocks=1, **options)
        generator.save_pretrained("generator")
        report = convert("generator", "net.pth")
        written = torch.load("net.pth", weights_only=True)
        written, prefix = (written[wrapper], f"{wrapper}/") if wrapper else (written, "")
        assert same(written, generator.published_state_dict()) and name in written
        assert [new for _, new in report.tensors] == [prefix + name for name in written]
        back = convert("net.pth", "back")
        assert [old for old, _ in back.tensors] == [prefix + name for name in written]
        assert same(RRDB.from_pretrained("back").state_dict(), generator.state_dict())


def test_all_that_does_not_fit_is_named_and_nothing_written(model):
    state = model.published_state_dict()
    gone = list(state)[:9]
    for name in gone:
        del state[name]
    state |= {f"extra{index}": torch.zeros(1) for index in range(7)}
    state["flowUpsamplerNet.f.0.bias"] = torch.zeros(1)
    torch.save(state, "net.pth")
    with pytest.raises(CheckpointError, match="9 missing: .*, …; 7 unexpected: ") as caught:
        convert("net.pth", "out/model", model.config)
    assert caught.value.problems == {
        "missing": gone,
        "unexpected": [f"extra{index}" for index in range(7)],
        "of the wrong shape": ["flowUpsamplerNet.f.0.bias (1,), expected (96,)"],
    }
    assert not Path("out").exists()


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors", "out"])
def test_a_write_that_fails_leaves_what_was_there(model, out):
    model.save_pretrained("model")
    convert("model", out)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with full_disk(), pytest.raises(OSError, match=f"File too large: '{out}"):
        convert("model", out)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_onto_itself(model):
    model.save_pretrained("model")
    with pytest.raises(
        ValueError, match="out: 'model/config.json' would replace the source 'model/config.json', which is read; choose"
    ):
        convert("model", "./model")
    assert files.shipped() and NCSR.from_pretrained("model")
