"""Many samples of an image: independent of how they are grouped, and never silently broken."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from support import image, tiny_model

from ncsr_fast import NCSR
from ncsr_fast.flow.samples import NonFiniteSamples


def draw(model: NCSR, lr: torch.Tensor, n: int, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return model.sample(lr, n=n, generator=torch.Generator().manual_seed(3), **arguments)


@pytest.mark.parametrize("together", [1, 2, 3, 5, None])
def test_how_many_are_decoded_together_does_not_matter(together):
    model = tiny_model(steps=2, noise_steps=(0, 1, 2))
    lr = image(2, 3, 4, 6, seed=1)
    model.engine = "plain"
    expected = draw(model, lr, 5)
    model.options = replace(model.options, engine="fused", samples_at_once=together)
    assert torch.allclose(draw(model, lr, 5), expected, rtol=0, atol=1e-11)


def test_images_and_samples_are_independent():
    """The samples of an image are those it has alone, and the first do not depend on how many are drawn."""
    model = tiny_model()
    lr = image(3, 3, 4, 4, seed=1)
    many, few = draw(model, lr, 4), draw(model, lr, 1)
    assert torch.allclose(many[:, :1], few, rtol=0, atol=1e-12)


def test_the_encoder_runs_once():
    model = tiny_model()
    with mock.patch.object(model.encoder, "pyramid", side_effect=model.encoder.pyramid) as pyramid:
        draw(model, image(1, 3, 4, 4), 7)
    assert pyramid.call_count == 1


def test_gradients_flow_through_samples_that_share_their_condition():
    """With gradients recorded, n samples of two images: as n passes of the plain path."""
    gradients = []
    for engine in ("fused", "plain"):
        model = tiny_model()
        model.engine = engine
        lr = image(2, 3, 4, 2, seed=1).requires_grad_()
        sr = model.sample(lr, n=3, generator=torch.Generator().manual_seed(3))
        (sr * torch.linspace(-1, 1, sr.numel(), dtype=sr.dtype).view(sr.shape)).sum().backward()
        gradients.append([lr.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for fused, plain in zip(*gradients, strict=True):
        assert torch.allclose(fused, plain, rtol=1e-9, atol=1e-10 * float(plain.abs().max()))


def explosive(level: int = 1, step: int = 1) -> NCSR:
    """Has a coupling that divides by 1e-4 wherever z1 is large, which it is not for usual latents."""
    model = tiny_model(dtype=torch.float32, steps=3, noise_steps=(0, 0, 0))
    with torch.no_grad():
        couplings = model.levels[level].couplings
        couplings.conv1[step].zero_()
        couplings.conv1[step, :, : model.levels[level].pass_through, 1, 1] = 1.0
        couplings.norm1_bias[step] = -150.0  # relu: nothing happens until the channels of z1 sum to 150
        couplings.conv2[step] = torch.eye(4)[:, :, None, None]
        couplings.norm2_bias[step] = 0.0
        couplings.conv3[step, 1::2] = -10.0
    return model


def failing_latents(model: NCSR, bad: tuple[int, ...]):
    """Latents of which those of the samples `bad` are thirty times too large, and further draws are not."""
    from ncsr_fast.flow import samples

    first = True

    def draw_latents(*arguments):
        nonlocal first
        latents = sampling_draw(*arguments)
        for latent in latents if first else []:
            latent[:, list(bad)] *= 30
        first = False
        return latents

    sampling_draw = samples.draw_latents
    return mock.patch.object(samples, "draw_latents", side_effect=draw_latents)


def test_a_sample_that_blows_up_is_named():
    model, lr = explosive(), image(1, 3, 4, 4, dtype=torch.float32)
    healthy = draw(model, lr, 4)  # a warning would be an error
    assert healthy.isfinite().all()
    with (
        failing_latents(model, (2,)),
        pytest.warns(RuntimeWarning, match=r"1 of 4 samples.*level 2, step 1 \(image 0, sample 2\)"),
    ):
        broken = draw(model, lr, 4)
    others = [0, 1, 3]
    assert torch.equal(broken[:, others], healthy[:, others]), "the other samples are not touched"


def test_raise_ignore_and_retry():
    model, lr = explosive(), image(1, 3, 4, 4, dtype=torch.float32)
    healthy = draw(model, lr, 4)
    with failing_latents(model, (0, 3)), pytest.raises(NonFiniteSamples, match="2 of 4 samples"):
        draw(model, lr, 4, on_nonfinite="raise")
    with failing_latents(model, (0, 3)), mock.patch("warnings.warn") as warn:
        draw(model, lr, 4, on_nonfinite="ignore")
    assert not warn.called
    with (
        failing_latents(model, (0, 3)),
        pytest.warns(RuntimeWarning, match="all were drawn again, the last at temperature 0.72"),
    ):
        again = draw(model, lr, 4, on_nonfinite="retry")
    assert again.isfinite().all()
    assert torch.equal(again[:, 1:3], healthy[:, 1:3])
    assert not torch.equal(again[:, 0], healthy[:, 0])
    with pytest.raises(ValueError, match="on_nonfinite must be one of"):
        draw(model, lr, 1, on_nonfinite="clamp")


def test_one_broken_number_flags_its_sample_alone():
    model, lr = tiny_model(), image(2, 3, 4, 4)
    from ncsr_fast.flow import samples

    original = samples.draw_latents

    def with_a_nan(*arguments):
        latents = original(*arguments)
        latents[-1][1, 2, 0, 0, 0] = torch.nan
        return latents

    patch = mock.patch.object(samples, "draw_latents", side_effect=with_a_nan)
    with patch, pytest.warns(RuntimeWarning, match=r"1 of 6 samples.*level 3, step 0 \(image 1, sample 2\)"):
        sr = draw(model, lr, 3)
    assert sr[0].isfinite().all() and sr[1, :2].isfinite().all()


def test_invertibility_report():
    model, lr = explosive(level=0, step=2), image(1, 3, 4, 4, dtype=torch.float32)
    report = model.check_invertibility(lr, generator=torch.Generator().manual_seed(0))
    assert report.healthy and report.round_trip < 1e-2  # of images 500 times too bright
    assert [(s.level, s.step) for s in report.steps] == [(level, step) for level in (2, 1, 0) for step in (2, 1, 0, -1)]
    for step in report.steps:
        weight = model.levels[step.level].invconv[step.step + 1].detach().double()
        singular = torch.linalg.svdvals(weight)
        assert step.condition == pytest.approx(float(singular[0] / singular[-1]), rel=1e-9)
        assert step.round_trip < 1e-5
    with torch.no_grad():
        couplings = model.levels[0].couplings
        couplings.bias3[1, 1::2], couplings.conv3[1], couplings.logs3[1] = -9.0, 0.0, 0.0
    report = model.check_invertibility(lr)
    first = report.first_unhealthy
    assert not report.healthy
    assert (first.level, first.step, first.of) == (0, 1, "coupling")
    assert first.smallest_scale == pytest.approx(1 / (1 + math.exp(7)) + 1e-4, rel=1e-4)
    assert report.worst.smallest_scale <= first.smallest_scale
    assert "not healthy from level 1, step 1 on" in str(report)
