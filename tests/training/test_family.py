"""Training of NCSR's relatives: residuals of a base, other networks, dark photographs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import assert_same_weights, log_rows, randomize, tiny_config, tiny_settings

from ncsr_fast import NCSR, NCSRConfig
from ncsr_fast.data import equalize, low_light_input, match_brightness, read_image, to_float
from ncsr_fast.data.darkening import darken_folder
from ncsr_fast.metrics import psnr
from ncsr_fast.training import train
from ncsr_fast.training.batch import Draws
from ncsr_fast.training.memory import estimate
from ncsr_fast.training.settings import PUBLISHED
from ncsr_fast.training.stages import FlowObjective, FlowStage
from ncsr_fast.training.validation import validation_pairs
from ncsr_fast.training.watch import sample_metrics

FS_NCSR = tiny_config(system="fs-ncsr")
DEEP = {system: tiny_config(system=system, steps=steps, noise_channels=0, noise_steps=()) for system, steps in (
    ("srflow-da", 1), ("srflow-da-r", 1), ("srflow-da-d", 1), ("srflow-da-s", 2),
)}  # fmt: skip
LOW_LIGHT = NCSRConfig(
    scale=1,
    channels=4,
    growth=2,
    blocks=1,
    stacked_blocks=(0,),
    steps=1,
    transition_steps=1,
    hidden_channels=4,
    system="llflow",
)
SLOW = (pytest.mark.slow,)
DEEP_NOISE = {name: PUBLISHED["srflow-da-x4"][name] for name in ("max_std", "fixed_std", "lr_noise")}


@pytest.fixture
def dark(photos, tmp_path):
    """Dark ones of the photographs."""
    darken_folder(photos, tmp_path / "dark")
    return tmp_path / "dark"


@pytest.fixture
def low_light(photos, dark):
    """Settings of a run of seconds."""
    changes = {"lr_images": (str(dark),), "encoder_steps": 0, "unfreeze": 0.0, "lr_noise": False, "max_std": 0.0}
    return tiny_settings(photos, model=LOW_LIGHT, reference_prior=0.5, validation_images=1, **changes)


def first_crops(settings, count: int = 2):
    """Bright crops, and the dark ones stacked with the equalized."""
    hr = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    low = hr // 6
    return hr, torch.cat([low, equalize(low)], dim=1)


@pytest.mark.parametrize(
    "config, changes",
    [
        (FS_NCSR, {}),
        *(pytest.param(config, DEEP_NOISE, marks=SLOW * (config.system != "srflow-da")) for config in DEEP.values()),
    ],
    ids=["fs-ncsr", *DEEP],
)
def test_relatives_train(photos, tmp_path, config, changes):
    settings = tiny_settings(photos, model=config, encoder_steps=1, steps=2, validation_images=1, unfreeze=0.5, **changes)
    model = train(settings, tmp_path / "run")
    assert model.config == config
    assert_same_weights(model, NCSR.from_pretrained(tmp_path / "run" / "model"))
    rows = [row["validation"] for row in log_rows(tmp_path / "run") if "validation" in row]
    assert {"nll", "psnr@0", "lr_psnr@0", "psnr@0.8"} <= set(rows[-1])


def test_a_trained_residual_is_of_the_picture(photos, tmp_path):
    """Samples are the base and a residual, which is small: a fresh FS-NCSR at temperature 0 is near bicubic."""
    model = train(tiny_settings(photos, model=FS_NCSR, encoder_steps=0, steps=1), tmp_path / "run")
    lr = to_float(read_image(photos / "a.png"))[None, :, :24, :24]
    with torch.no_grad():
        sr = model.sample(lr, n=1, temperature=0.0)[0, 0]
    base = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic")[0].clamp(0, 1)
    assert (sr - base).abs().mean() < 0.1


def test_the_likelihood_of_validation_is_that_of_the_residual(photos):
    torch.manual_seed(0)
    model = randomize(NCSR(FS_NCSR)).float()
    settings = tiny_settings(photos, model=FS_NCSR, max_std=0.0, temperatures=(0.0,))
    hr, lr = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        found, images = FlowStage(model, settings).validate(hr, lr, torch.Generator())
        base = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic")
        expected = model.nll(hr - base, lr, torch.zeros_like(hr))
        latents = [torch.zeros(1, *shape) for shape in model.latent_shapes(8, 8)]
        raw = model.decode(latents, lr) + base
    assert found["nll"] == pytest.approx(float(expected), rel=1e-5)
    assert found["saturated@0"] == pytest.approx(float(((raw < 0) | (raw > 1)).double().mean()), abs=1e-3)
    assert torch.allclose(images[0], raw[0].clamp(0, 1), atol=1e-5)


def test_validation_has_the_noise_of_training(photos):
    """SRFlow-DA's LR images have none, and its noise is as large in every image."""
    torch.manual_seed(0)
    config = DEEP["srflow-da"]
    model = randomize(NCSR(config), amount=0.2).float()
    stage = FlowStage(model, tiny_settings(photos, model=config, temperatures=(), **{**DEEP_NOISE, "max_std": 0.5}))
    hr, lr = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 8, 8)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        found, _ = stage.validate(hr, lr, generator)
        torch.rand(1, generator=generator.manual_seed(5))  # the share of the standard deviation, which is not used
        noise = torch.randn(hr.shape, generator=generator)
        expected = model.nll(hr + 0.5 * noise, lr)
    assert found["nll"] == pytest.approx(float(expected), rel=1e-5)


def test_a_low_light_run(low_light, photos, dark, tmp_path):
    settings = replace(low_light, validation=str(photos), validation_lr=str(dark), steps=3)
    model = train(settings, tmp_path / "run")
    assert_same_weights(model, NCSR.from_pretrained(tmp_path / "run" / "model"))
    row = [row["validation"] for row in log_rows(tmp_path / "run") if "validation" in row][-1]
    names = ("psnr", "psnr_at_reference_brightness", "ssim", "nonfinite", "saturated")
    assert set(row) == {"nll", "smallest_scale", "round_trip"} | {f"{name}@{t}" for name in names for t in ("0", "0.8")}
    sheet = read_image(tmp_path / "run" / "samples" / "flow-00000003.png")
    assert sheet.shape == (3, 64, 4 * 64)
    (hr, lr), *_ = validation_pairs(settings, (), slice(None)).values()
    assert torch.equal(sheet[:, :, :64], lr[:3]) and torch.equal(sheet[:, :, -64:], hr)
    first, low = read_image(photos / "a.png"), read_image(dark / "a.png")
    top, left = ((side - 64) // 2 // 8 * 8 for side in first.shape[1:])
    assert torch.equal(lr[3:], equalize(low)[:, top : top + 64, left : left + 64]), "the histogram is the whole image's"


@pytest.mark.slow
def test_a_low_light_run_that_is_resumed_ends_as_one_that_was_not(low_light, tmp_path, monkeypatch):
    """The prior that a step draws is its own."""
    drawn, original = [], FlowObjective.forward

    def forward(self, hr, lr, *draws):
        drawn.append(bool(Draws(*draws).reference[0]))
        if len(drawn) == stop:
            raise InterruptedError
        return original(self, hr, lr, *draws)

    monkeypatch.setattr(FlowObjective, "forward", forward)
    stop = None
    whole = train(replace(low_light, steps=8), tmp_path / "whole")
    expected, stop = list(drawn), 6
    assert set(expected) == {False, True}
    drawn.clear()
    with pytest.raises(InterruptedError):
        train(replace(low_light, steps=8), tmp_path / "run")
    stop = None
    assert_same_weights(train(replace(low_light, steps=8), tmp_path / "run"), whole)
    assert drawn[6:] == expected[4:], "from the checkpoint after the fourth step"


def test_the_objective_has_the_prior_of_its_draw(low_light):
    torch.manual_seed(0)
    model = randomize(NCSR(LOW_LIGHT)).float()
    hr, lr = first_crops(low_light)
    settings = replace(low_light, flip=False, rotate=False)
    images, inputs = to_float(hr), low_light_input(lr[:, :3], lr[:, 3:])
    objective = FlowObjective(model, settings)
    losses, gradients = {}, {}
    for name, chosen in (("condition", False), ("reference", True)):
        draws = Draws.at_step(0, settings, torch.Generator())._replace(reference=torch.full((2,), chosen))
        model.zero_grad()
        losses[name] = objective(hr, lr, *draws)
        losses[name][0].backward()
        gradients[name] = model.encoder.conv_color_map.weight.grad.abs().sum()
        with torch.no_grad():
            assert torch.allclose(losses[name][1], model.nll(images, inputs, prior=name).mean(), rtol=1e-6, atol=0)
    assert losses["condition"][0] != losses["reference"][0]
    assert gradients["condition"] > 0 and gradients["reference"] == 0


def test_the_prior_of_each_image():
    """A tensor chooses for every image what a word chooses for all."""
    torch.manual_seed(0)
    model = randomize(NCSR(LOW_LIGHT)).double()
    hr, lr = first_crops(None, 3)
    hr, lr = to_float(hr).double(), low_light_input(lr[:, :3], lr[:, 3:]).double()
    with torch.no_grad():
        words = {prior: model.nll(hr, lr, prior=prior) for prior in ("condition", "reference")}
        chosen = torch.tensor([True, False, True])
        assert torch.equal(model.nll(hr, lr, prior=chosen), torch.where(chosen, words["reference"], words["condition"]))
    with pytest.raises(ValueError, match="prior='reference' is for flows whose prior has a mean"):
        NCSR(tiny_config()).double().nll(hr[:, :, :32, :32], hr[:, :, :8, :8], prior=chosen)
    for wrong in (chosen[:2], chosen.double()):
        with pytest.raises(ValueError, match=r"prior must be .3,. bool, one for each image, not"):
            model.nll(hr, lr, prior=wrong)


def test_l1_of_a_low_light_model_is_of_the_most_likely_image(low_light):
    torch.manual_seed(0)
    model = randomize(NCSR(LOW_LIGHT)).float()
    hr, lr = first_crops(low_light)
    settings = replace(low_light, flip=False, rotate=False, l1_weight=2.0)
    draws = Draws.at_step(0, settings, torch.Generator())
    loss, nll, l1 = FlowObjective(model, settings)(hr, lr, *draws)
    inputs = low_light_input(lr[:, :3], lr[:, 3:])
    with torch.no_grad():
        encoded = model.encode(to_float(hr), inputs)
        likely = model.decode([encoded.prior_mean], inputs)
    assert l1.item() == pytest.approx(float((likely - to_float(hr)).abs().mean()), rel=1e-4)
    assert loss.item() == pytest.approx(nll.item() + 2 * l1.item(), rel=1e-5)


def test_psnr_at_the_brightness_of_the_reference(low_light):
    torch.manual_seed(0)
    model = randomize(NCSR(LOW_LIGHT)).float()
    hr, lr = first_crops(low_light, 1)
    hr, inputs = to_float(hr), low_light_input(lr[:, :3], lr[:, 3:])
    with torch.no_grad():
        found, sr = sample_metrics(model, hr, inputs, 0.0, torch.Generator())
        raw = model.decode([model.encode(hr, inputs).prior_mean], inputs)
    assert found["psnr"] == pytest.approx(float(psnr(raw.clamp(0, 1), hr)), abs=0.01)
    assert found["psnr_at_reference_brightness"] == pytest.approx(float(psnr(match_brightness(raw, hr), hr)), abs=0.01)
    assert abs(found["psnr"] - found["psnr_at_reference_brightness"]) > 0.1 and "lr_psnr" not in found


@pytest.mark.slow
def test_estimates(low_light):
    """Of the memory of a step, on tensors without values."""
    found = estimate(low_light, alternatives=False)
    assert list(found.variants[0].stages) == ["flow, encoder trained"] and found.total > 0
    deep = estimate(tiny_settings("photos", model=DEEP["srflow-da"], **DEEP_NOISE), alternatives=False)
    assert list(deep.variants[0].stages) == ["encoder stage", "flow, encoder frozen", "flow, encoder trained"]
