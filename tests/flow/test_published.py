"""Published files in and out: names, strictness, the encoder's namings, and which model a file is of."""

from __future__ import annotations

import re

import pytest
import torch
from operator_cases import marked
from safetensors.torch import save_file
from support import assert_same_weights, image, tiny_config, tiny_model

from ncsr_fast import NCSR, RRDB, CheckpointError, NCSRConfig
from ncsr_fast.checkpoints import published
from ncsr_fast.checkpoints.state_dicts import read_state_dict
from ncsr_fast.encoder.checkpoints import from_state
from ncsr_fast.encoder.names import read_generator


def test_round_trip_keeps_the_function_and_the_unused_tensors():
    model = tiny_model()
    state = model.published_state_dict()
    unused = "flowUpsamplerNet.f.0.bias"
    state[unused] = torch.arange(96.0, dtype=torch.float64)
    other = NCSR(model.config).double()
    other.load_published(state)
    hr, lr = image(1, 3, 8, 8, seed=1), image(1, 3, 2, 2, seed=2)
    assert torch.equal(other.nll(hr, lr), model.nll(hr, lr))
    assert other.actnorm_initialized
    back = other.published_state_dict()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_exported_tensors_are_copies():
    model = tiny_model()
    for tensor in model.published_state_dict().values():
        tensor.zero_()
    assert model.levels[0].invconv.abs().sum() > 0


def test_places_of_parameters_in_one_buffer():
    """As optimizers and wrappers that flatten a model lay them."""
    model = tiny_model()
    expected = published.places(model)
    assert len({place for place in expected.values() if place}) == len([place for place in expected.values() if place])
    buffer = torch.cat([parameter.data.flatten() for parameter in model.parameters()])
    for part, parameter in zip(buffer.split([p.numel() for p in model.parameters()]), model.parameters()):
        parameter.data = part.view_as(parameter)
    assert published.places(model) == expected


def test_a_state_dict_that_does_not_fit_changes_nothing_and_is_explained():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = model.published_state_dict()
    state["extra.weight"] = torch.zeros(1)
    del state["RRDB.conv_first.bias"]
    state["flowUpsamplerNet.layers.1.invconv.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError) as caught:
        model.load_published(state)
    message = str(caught.value)
    assert "1 missing: RRDB.conv_first.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "flowUpsamplerNet.layers.1.invconv.weight (3, 3), expected (12, 12)" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_another_model_names_the_first_mismatches():
    with pytest.raises(
        CheckpointError, match=r"does not fit this model \(NCSR, noise-conditional, ×4, 2 blocks, 1 steps per level\)"
    ):
        tiny_model().load_published(tiny_model(blocks=3, stacked_blocks=(0, 2)).published_state_dict())


WRAPS = {
    "bare": lambda state: state,
    "basicsr": lambda state: {"params": {"conv_first.weight": torch.zeros(1)}, "params_ema": state},
    "lightning": lambda state: {"epoch": 1, "state_dict": state, "optimizer_states": [{"state": {}}], "lr_schedulers": []},
    "ours": lambda state: {"stage": "flow", "step": 2, "model": state, "optimizer": {}, "generator": torch.zeros(8)},
    "twice": lambda state: {"model": {"state_dict": state}},
}


@marked("exhaustive", lambda wrap, prefix: wrap != "ours" and prefix != "module.")  # either is undone by itself
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("wrap", WRAPS)
def test_files(tmp_path, wrap, prefix):
    model = tiny_model()
    model.actnorm_initialized.fill_(True)
    state = model.published_state_dict()
    torch.save(WRAPS[wrap]({prefix + name: tensor for name, tensor in state.items()}), tmp_path / "model.pth")
    found = read_state_dict(tmp_path / "model.pth")
    assert list(found) == list(state) and all(torch.equal(found[name], state[name]) for name in state)
    assert_same_weights(model, NCSR.from_pretrained(tmp_path / "model.pth", config=model.config))


def test_a_safetensors_file(tmp_path):
    model = tiny_model()
    model.actnorm_initialized.fill_(True)
    save_file(model.published_state_dict(), tmp_path / "model.safetensors")
    assert_same_weights(model, NCSR.from_pretrained(tmp_path / "model.safetensors", config=model.config))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="model.safetensors' is not a readable checkpoint: it is truncated or corrupt"):
        read_state_dict(tmp_path / "model.safetensors")


def test_a_training_state_without_the_network(tmp_path):
    """What the published trainers, and BasicSR, write to N.state."""
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(adam, [5])
    state = {"epoch": 1, "iter": 5, "schedulers": [scheduler.state_dict()], "optimizers": [adam.state_dict()]}
    torch.save(state, tmp_path / "5.state")
    with pytest.raises(CheckpointError, match=r"5.state' is a training state: .* no network; .* models/ITERATION_G.pth"):
        NCSR.from_pretrained(tmp_path / "5.state")


class Malicious:
    """Unpickles as a call that leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_bad_pth_files(tmp_path):
    torch.save(tiny_model().published_state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    torch.save({"x": Malicious(tmp_path / "trace")}, tmp_path / "malicious.pth")
    for name in ("truncated.pth", "text.pth", "malicious.pth"):
        with pytest.raises(CheckpointError, match=f"{name}' is not a readable checkpoint"):
            read_state_dict(tmp_path / name)
    with pytest.raises(CheckpointError, match="it holds a .*open, which is more than tensors and is not executed") as caught:
        read_state_dict(tmp_path / "malicious.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        read_state_dict(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_state_dict(tmp_path / "absent.pth")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    # without noise_channels it would be found as the preset itself
    [
        pytest.param({"preset": "ncsr-compact-x4"}, marks=pytest.mark.exhaustive),
        {"preset": "ncsr-compact-x4", "noise_channels": 1},
    ],
    ids=["noise", "std"],
)
def test_the_configuration_of_a_file_is_found_by_its_shapes(tmp_path, changes):
    values = NCSRConfig.preset(changes.pop("preset")).to_dict() | changes
    model = NCSR(NCSRConfig.from_dict(values))
    torch.save(model.published_state_dict(), tmp_path / "model.pth")
    assert NCSR.from_pretrained(tmp_path / "model.pth").config == model.config


@pytest.mark.slow
def test_a_file_of_no_preset_asks_for_its_configuration(tmp_path):
    torch.save(tiny_model().published_state_dict(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="fits no preset .* with the nearest, .*config=NCSRConfig.from_published"):
        NCSR.from_pretrained(tmp_path / "model.pth")


# -- encoder weights ---------------------------------------------------------------------------------------------


def encoder(scale: int = 4, seed: int = 0) -> RRDB:
    torch.manual_seed(seed)
    return RRDB(scale, channels=4, growth=2, blocks=2, long_skip="last_block")


def basicsr(name: str) -> str:
    name = name.replace("RRDB_trunk", "body").replace("RDB", "rdb").replace("trunk_conv", "conv_body")
    return re.sub("upconv", "conv_up", name).replace("HRconv", "conv_hr")


def old_esrgan(name: str, doublings: int = 2) -> str:
    name = re.sub(r"RRDB_trunk\.(\d+)\.RDB(\d)\.conv(\d)", r"model.1.sub.\1.RDB\2.conv\3.0", name)
    name = name.replace("trunk_conv", "model.1.sub.2")
    places = {f"upconv{index}": 3 * index for index in range(1, doublings + 1)}
    for new, old in {"conv_first": 0, **places, "HRconv": 3 * doublings + 2, "conv_last": 3 * doublings + 4}.items():
        name = name.replace(new, f"model.{old}")
    return name


@pytest.mark.parametrize("doublings", [1, 2, 3])
def test_old_esrgan_of_any_scale(doublings):
    assert old_esrgan("HRconv.bias") == "model.8.bias" and old_esrgan("conv_last.bias") == "model.10.bias"  # ESRGAN ×4 itself
    source = RRDB(2**doublings, channels=4, growth=2, blocks=2)
    state = {old_esrgan(name, doublings): tensor for name, tensor in source.published_state_dict().items()}
    again = from_state(RRDB, read_generator(state))
    assert again.configuration() == source.configuration()
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), again.parameters()))


@pytest.mark.parametrize(
    "rename", [str, basicsr, old_esrgan, "RRDB.{}".format], ids=["srflow", "basicsr", "old-esrgan", "flow"]
)
def test_encoder_weights_in_every_naming(rename):
    source = encoder()
    published = source.published_state_dict()
    assert "RRDB_trunk.1.RDB3.conv5.weight" in published and "upconv2.bias" in published
    state = {rename(name): tensor for name, tensor in published.items()}
    target = encoder(seed=1)
    target.load_published(state)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters()))


def test_encoder_weights_that_do_not_fit():
    with pytest.raises(
        CheckpointError, match=r"does not fit this encoder \(RRDB, ×8, 2 blocks of 4 channels\); 2 missing: upconv3.weight"
    ):
        encoder(8).load_published(encoder().published_state_dict())


@pytest.mark.parametrize("scale", [4, 8])
def test_the_size_of_a_generator_file_is_read_off_its_shapes(tmp_path, scale):
    torch.manual_seed(0)
    source = RRDB(scale, channels=6, growth=3, blocks=2)
    torch.save(
        {"params": {basicsr(name): value for name, value in source.published_state_dict().items()}}, tmp_path / "rrdb.pth"
    )
    lr = image(1, 3, 3, 5, dtype=torch.float32)
    again = RRDB.from_pretrained(tmp_path / "rrdb.pth")
    assert again.configuration() == source.configuration() and torch.equal(again(lr), source(lr))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not fit an RRDB generator: it has no 'RRDB_trunk.0.RDB1.conv1.weight'"):
        RRDB.from_pretrained(tmp_path / "other.pth")


def test_encoder_part_of_a_flow_checkpoint():
    model = tiny_model(dtype=torch.float32)
    target = encoder()
    target.load_published(model.published_state_dict())
    lr = image(1, 3, 4, 4, dtype=torch.float32)
    assert torch.equal(target(lr), model.encoder(lr))


def test_state_dict_names_follow_the_configuration():
    """The published network has the noise coupling in every step, whether a level uses it or not."""
    names = tiny_model().published_state_dict()
    assert "flowUpsamplerNet.layers.2.affine.fAffine_std.0.weight" in names
    assert not any("fAffine_std" in name for name in tiny_model(noise_channels=0, noise_steps=()).published_state_dict())
    assert tiny_config().noise_steps[0] == 0
