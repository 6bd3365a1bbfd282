"""What a conditional flow must be: invertible, with the log-determinant of its real Jacobian, differentiable."""

from __future__ import annotations

import math

import pytest
import torch
from operator_cases import marked
from support import image, tiny_config, tiny_model

from ncsr_fast import NCSR


def condition(model: NCSR, lr: torch.Tensor, seed: int = 5) -> torch.Tensor | None:
    """A noise condition of the shape the model wants."""
    channels, scale = model.config.noise_channels, model.config.scale
    if channels == 0:
        return None
    shape = (1, 1) if channels == 1 else (lr.shape[2] * scale, lr.shape[3] * scale)
    return 0.1 * image(lr.shape[0], channels, *shape, seed=seed, dtype=lr.dtype)


VARIANTS = {
    "noise": {},
    "std": {"noise_channels": 1},
    "without-layer": {"noise_steps": (0, 0, 0)},
    "all-blocks": {"noise_steps": (1, 1, 1)},
    "srflow": {"noise_channels": 0, "noise_steps": ()},
    "x8": {"scale": 8, "noise_steps": (0, 0, 1, 1)},
}


@marked("slow", lambda variant, size: variant not in ("noise", "srflow") and size != (3, 2))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(2, 2), (4, 6), (1, 1), (1, 5), (3, 2), (7, 3)], ids=str)
def test_decode_inverts_encode(variant, size):
    model = tiny_model(**VARIANTS[variant])
    lr = image(2, 3, *size, seed=1)
    hr = image(2, 3, *(side * model.config.scale for side in size), seed=2)
    noise = condition(model, lr)
    latents = model.encode(hr, lr, noise).latents
    assert [tuple(latent.shape[1:]) for latent in latents] == model.latent_shapes(*size)
    restored = model.decode(latents, lr, noise)
    assert restored.shape == hr.shape
    # float64 rounding through about a dozen maps whose scales are within [0.5, 2]
    assert (restored - hr).abs().max() < 1e-11


@marked("slow", lambda variant: variant != "noise")
@pytest.mark.parametrize("variant", VARIANTS)
def test_log_likelihood_has_the_determinant_of_the_jacobian(variant):
    """log p(hr) = log N(latents; 0, I) + log|det d latents / d hr|, the Jacobian taken column by column by autograd."""
    model = tiny_model(**VARIANTS[variant])
    scale = model.config.scale
    lr = image(1, 3, 2, 2, seed=1)
    hr, noise = image(1, 3, 2 * scale, 2 * scale, seed=2), condition(model, lr)

    def flat_latents(flat: torch.Tensor) -> torch.Tensor:
        return torch.cat([latent.flatten() for latent in model.encode(flat.view(hr.shape), lr, noise).latents])

    jacobian = torch.autograd.functional.jacobian(flat_latents, hr.flatten(), vectorize=True)
    assert jacobian.shape == (hr.numel(), hr.numel())
    sign, logabsdet = torch.linalg.slogdet(jacobian)
    latents = flat_latents(hr.flatten())
    density = (-0.5 * latents.square() - 0.5 * math.log(2 * math.pi)).sum()
    encoded = model.encode(hr, lr, noise)
    assert sign != 0
    assert encoded.log_likelihood.item() == pytest.approx((density + logabsdet).item(), abs=1e-8)
    expected_nll = -(density + logabsdet) / (math.log(2) * hr.shape[2] * hr.shape[3])
    assert model.nll(hr, lr, noise).item() == pytest.approx(expected_nll.item(), abs=1e-10)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_gradcheck_of_a_tiny_flow(fast):
    """Finite differences of nll and of decode, with respect to the images, the noise and parameters of every kind: along one
    random direction of all inputs and outputs, or with `fast` off along each.
    """
    model = tiny_model()
    lr, hr = image(1, 3, 2, 2, seed=1), image(1, 3, 8, 8, seed=2)
    noise = condition(model, lr)
    names = [
        "levels.0.actnorm_bias", "levels.0.actnorm_logs", "levels.0.invconv", "levels.0.split_bias", "levels.0.split_logs",
        "levels.1.couplings.norm1_logs", "levels.1.noise_couplings.conv2", "levels.2.injectors.logs3",
        "encoder.conv_first.bias",
    ]  # fmt: skip
    tensors = [dict(model.named_parameters())[name].detach().requires_grad_() for name in names]
    latents = [latent.detach() for latent in model.encode(hr, lr, noise).latents]

    class Call(torch.nn.Module):
        """nll or decode as forward, for functional_call."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, method, *args):
            return getattr(self.model, method)(*args)

    def call(method, args, values):
        return torch.func.functional_call(Call(), {f"model.{n}": v for n, v in zip(names, values)}, (method, *args))

    # a difference over 1e-6 of float64 values of about 1 is exact to some 1e-9
    options = {"fast_mode": fast, "atol": 1e-7, "rtol": 1e-5}
    images = [hr.requires_grad_(), lr.requires_grad_(), noise.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *values: call("nll", images, values), tensors, **options)
    assert torch.autograd.gradcheck(lambda a, b, c: model.nll(a, b, c), images, **options)
    decode = (latents, lr.detach(), noise.detach())
    assert torch.autograd.gradcheck(lambda *values: call("decode", decode, values), tensors, **options)


def test_every_trainable_parameter_gets_a_gradient():
    model = tiny_model()
    lr, hr = image(1, 3, 4, 4, seed=1), image(1, 3, 16, 16, seed=2)
    model.nll(hr, lr, condition(model, lr)).mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert without == frozen
    assert {name.split(".")[1] for name in frozen} == {"conv_up", "conv_hr", "conv_last"}


def test_missing_noise_is_zero_noise():
    model = tiny_model()
    lr, hr = image(2, 3, 2, 4, seed=1), image(2, 3, 8, 16, seed=2)
    assert torch.equal(model.nll(hr, lr), model.nll(hr, lr, torch.zeros_like(hr)))
    assert not torch.equal(model.nll(hr, lr), model.nll(hr, lr, condition(model, lr)))


def test_initialisation_normalises_what_it_sees():
    """After initialisation the first actnorm of every level yields mean 0 and variance 1 on the same batch."""
    model = tiny_model(steps=2, noise_steps=(0, 2, 2))
    lr, hr = image(4, 3, 4, 4, seed=1), image(4, 3, 16, 16, seed=2)
    model.initialize(hr, lr)
    z, features = hr, model.encoder.features(lr)
    for index, level in enumerate(model.levels):
        x = torch.nn.functional.pixel_unshuffle(z, 2)
        y = (x + level.actnorm_bias[0][:, None, None]) * level.actnorm_logs[0].exp()[:, None, None]
        assert y.mean(dim=(0, 2, 3)).abs().max() < 1e-12
        assert (y.var(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-4  # 1e-6 is added to the deviation
        noise = features[index].new_zeros(4, 3, *features[index].shape[2:])
        z, _, _ = level.encode(z, features[index], noise)


def test_reloading_keeps_the_initialised_flag():
    model = tiny_model()
    model.initialize(image(2, 3, 8, 8), image(2, 3, 2, 2))
    again = NCSR(model.config).double()
    assert not again.actnorm_initialized
    again.load_state_dict(model.state_dict())
    assert again.actnorm_initialized


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 3), (5, 2)], ids=str)
def test_odd_sizes_are_those_of_the_padded_image(size):
    """Padding by hand and cropping gives the same images: nothing but the padding is different about odd sizes."""
    model = tiny_model()
    height, width = size
    lr = image(1, 3, height, width, seed=1)
    mode = lambda side: "reflect" if side > 1 else "replicate"  # noqa: E731
    padded = torch.nn.functional.pad(lr, (0, width % 2, 0, 0), mode=mode(width))
    padded = torch.nn.functional.pad(padded, (0, 0, 0, height % 2), mode=mode(height))
    generator = torch.Generator().manual_seed(3)
    sr = model.sample(lr, n=2, generator=generator)
    assert sr.shape == (1, 2, 3, 4 * height, 4 * width)
    whole = model.sample(padded, n=2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sr, whole[..., : 4 * height, : 4 * width])


def test_samples_come_from_the_generator():
    model = tiny_model()
    lr = image(2, 3, 4, 4, seed=1)
    draw = lambda n, seed: model.sample(lr, n=n, temperature=0.7, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    first = draw(4, 1)
    assert torch.equal(first, draw(4, 1))
    assert torch.equal(first[:, :2], draw(2, 1)), "the first samples must not depend on how many are drawn"
    assert not torch.equal(first, draw(4, 2))
    assert first.min() >= 0 and first.max() <= 1
    assert not torch.equal(first[:, 0], first[:, 1])


def test_temperature_zero_is_the_decoding_of_zero_latents():
    model = tiny_model()
    lr = image(2, 3, 4, 4, seed=1)
    zeros = [lr.new_zeros(2, *shape) for shape in model.latent_shapes(4, 4)]
    assert torch.equal(model.sample(lr, n=1, temperature=0.0)[:, 0], model.decode(zeros, lr).clamp(0, 1))


def test_pixels_that_overflowed_are_nan_and_not_clipped():
    """Positive values of the last step decoded become +inf, which clipping alone would turn into a bright pixel."""
    model = tiny_model()
    with torch.no_grad():
        model.levels[0].actnorm_logs[0].fill_(-708)  # decoding multiplies by exp(708) = 3e307
        model.levels[0].actnorm_bias[0].fill_(-1.79e308)  # and subtracts this; a float64 ends at 1.797e308
    lr = image(1, 3, 2, 2, seed=1)
    decoded = model.decode([lr.new_zeros(1, *shape) for shape in model.latent_shapes(2, 2)], lr)
    assert decoded.isinf().any() and not decoded.isnan().any()
    with pytest.warns(RuntimeWarning, match="1 of 1 samples"):
        sr = model.sample(lr, n=1, temperature=0.0)[:, 0]
    assert torch.equal(sr.isnan(), decoded.isinf())


def test_sampling_is_differentiable():
    model = tiny_model()
    lr = image(1, 3, 2, 2, seed=1).requires_grad_()
    model.sample(lr, n=2, generator=torch.Generator().manual_seed(0)).sum().backward()
    assert lr.grad.abs().sum() > 0 and model.levels[0].invconv.grad.abs().sum() > 0


def test_batch_items_do_not_mix():
    model = tiny_model()
    lr, hr = image(3, 3, 4, 2, seed=1), image(3, 3, 16, 8, seed=2)
    alone = torch.cat([model.nll(hr[i : i + 1], lr[i : i + 1]) for i in range(3)])
    assert torch.allclose(model.nll(hr, lr), alone, rtol=1e-12)


def test_compact_preset_is_compact():
    model = NCSR(tiny_config().preset("ncsr-compact-x4"))
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3_000_000
