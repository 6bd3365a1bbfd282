"""PyTorch's default dtype is the program's to choose: models are made in it, and those of another dtype stay what they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compat.networks import SMALL
from support import exports, image, randomize, relative_error, tiny_config

from ncsr_fast import NCSR, RRDB, accelerate, graphs, metrics
from ncsr_fast.decoder import Decoder
from ncsr_fast.evaluation import evaluate
from ncsr_fast.export import export_program


@pytest.fixture(
    params=[torch.float64, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str, autouse=True
)
def default(request) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=["fused", pytest.param("plain", marks=pytest.mark.slow)])
def model(request, default, dtype) -> NCSR:
    """One made under the default, in the dtype of a test."""
    torch.manual_seed(0)
    model = NCSR(tiny_config(), engine=request.param)
    assert {parameter.dtype for parameter in model.parameters()} == {default}
    return model.to(dtype)


def images(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return image(2, 3, 16, 16, seed=1, dtype=dtype), image(2, 3, 4, 4, seed=2, dtype=dtype)


def test_a_flow(model, dtype):
    hr, lr = images(dtype)
    assert model.initialize(hr, lr).dtype == dtype
    nll = model(hr, lr)
    nll.sum().backward()
    assert nll.dtype == dtype and all(p.grad.dtype == dtype for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        latents, likelihood, _ = model.encode(hr, lr)
        assert {latent.dtype for latent in latents} == {likelihood.dtype} == {dtype}
        decoded = model.decode(latents, lr)
        assert decoded.dtype == dtype and relative_error(decoded, hr) < 1e-4
        for on_nonfinite in ("warn", "retry"):
            assert model.sample(lr, 2, 0.5, torch.Generator().manual_seed(0), on_nonfinite=on_nonfinite).dtype == dtype
        assert model.check_invertibility(lr, 0.5).healthy
        assert model.freeze_for_inference().sample(lr, 2, 0.5).dtype == dtype


def test_results_do_not_depend_on_it(model, dtype):
    hr, lr = images(dtype)
    with torch.no_grad():
        found = [model(hr, lr), model.sample(lr, 2, 0.5, torch.Generator().manual_seed(0))]
        torch.set_default_dtype(torch.float32)
        expected = [model(hr, lr), model.sample(lr, 2, 0.5, torch.Generator().manual_seed(0))]
    assert all(torch.equal(value, of) for value, of in zip(found, expected))


def test_an_encoder(dtype):
    encoder = RRDB(4, 4, 4, 1, (0,)).to(dtype)
    _, lr = images(dtype)
    encoder(lr).sum().backward()
    assert encoder(lr).dtype == dtype and {features.dtype for features in encoder.features(lr)} == {dtype}


def test_saved_and_loaded(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NCSR.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


@pytest.mark.slow
def test_the_shipped_model():
    assert {parameter.dtype for parameter in NCSR.from_pretrained("ncsr-compact-x4").parameters()} == {torch.float32}


def test_rotations_are_rotations(default):
    """But for the rounding of their elements: rows are unit vectors, so that products of rows move by at most eps."""
    for level in NCSR(tiny_config()).levels:
        matrix = level.invconv.detach().double()
        error = (matrix @ matrix.mT - torch.eye(level.channels, dtype=torch.float64)).abs().max()
        assert error <= torch.finfo(default).eps + 1e-14


def test_a_step_of_training(model, dtype):
    hr, lr = images(dtype)
    optimizer = graphs.adam(model, lr=1e-3)
    assert optimizer.param_groups[0]["lr"].dtype == torch.float32  # a fused Adam on a GPU takes no other
    step = graphs.TrainingStep(model, optimizer, max_grad_norm=1.0, graph=False)
    before = model.levels[0].invconv.detach().clone()
    loss, norm = step(hr, lr)
    assert loss.dtype == dtype and not torch.equal(model.levels[0].invconv, before)
    assert step.counters.tolist() == [1, 0, 0, -1] and step.rate.dtype == torch.float32
    sr, first_bad = graphs.Sampler(model, 2, graph=False)(lr, 0.5)
    assert sr.dtype == dtype and (first_bad == 4).all()


def test_metrics(model, dtype):
    hr, lr = images(dtype)
    assert metrics.imresize(hr, 0.25).dtype == dtype
    assert metrics.psnr(hr, hr.flip(2)).dtype == metrics.ssim(hr, hr.flip(2)).dtype == torch.float64
    photo = (hr[0] * 255).to(torch.uint8)
    assert all(torch.tensor(list(score.means().values())).isfinite().all() for score in evaluate(model, [photo], [0.5], n=2))


@pytest.mark.slow
def test_an_accelerated_network(default, dtype):
    torch.set_default_dtype(torch.float32)  # in which published networks are made
    net, arguments = SMALL.build(dtype), SMALL.images(dtype)
    torch.set_default_dtype(default)
    with torch.no_grad():
        expected = net(**arguments)
        report = accelerate(net)
        found = net(**arguments)
        dequantised = net(**arguments, add_gt_noise=True)
        decoded = net(
            lr=arguments["lr"], z=image(2, 96, 4, 5, dtype=dtype), eps_std=0.5, reverse=True, **SMALL.condition(dtype)
        )
    assert {value.dtype for value in (*dequantised, *decoded)} == {dtype}
    assert not report.handed_over
    for value, of in zip(found, expected):
        assert value.dtype == of.dtype and relative_error(value, of) < 1e-4


def small_decoder(dtype: torch.dtype) -> Decoder:
    """One without latents."""
    model = randomize(NCSR(tiny_config(blocks=1, stacked_blocks=(), noise_channels=0, noise_steps=())))
    return Decoder(model.to(dtype), deterministic=True, clip=False)


def test_a_decoder(dtype):
    decoder = small_decoder(dtype)
    assert decoder(*decoder.example(1, 4, 4)).dtype == dtype


@exports
@pytest.mark.slow
def test_an_exported_decoder():
    """Of float32, which a constant of the default dtype would change; at a size other than it was traced with."""
    decoder = small_decoder(torch.float32)
    lr = image(3, 3, 4, 10, dtype=torch.float32)
    sr, expected = export_program(decoder).module()(lr), decoder(lr)
    assert sr.dtype == torch.float32 and relative_error(sr, expected) < 1e-5
