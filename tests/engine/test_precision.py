"""Precision of the networks, and a state that no flag makes less exact."""

from __future__ import annotations

import pytest
import torch
from support import image, relative_error, tiny_model

from ncsr_fast import NCSR
from ncsr_fast.precision import products_are_rounded


@pytest.fixture
def low_precision_flags():
    """What a training script may have set: every float32 product and convolution may be rounded."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("checkpoint", [True, False])
def test_no_matrix_product_of_the_state_can_be_rounded(checkpoint, low_precision_flags):
    """Whether PyTorch rounds a float32 product depends on its size and the processor; so none may be float32."""
    model = tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 2, 2))
    model.options = type(model.options)(backend="reference", checkpoint=checkpoint)
    lr, hr = image(1, 3, 4, 4, dtype=torch.float32), image(1, 3, 16, 16, dtype=torch.float32)
    dtypes: list[torch.dtype] = []
    with _Watch(("mm", "bmm", "addmm", "baddbmm"), lambda tensors: dtypes.extend(t.dtype for t in tensors)):
        encoded = model.encode(hr, lr)
        encoded.log_likelihood.sum().backward()
        model.decode([latent.detach() for latent in encoded.latents], lr)
    assert len(dtypes) > 50 and set(dtypes) == {torch.float64}


def test_flags_are_seen(low_precision_flags):
    assert products_are_rounded("cpu")
    torch.set_float32_matmul_precision("highest")
    assert not products_are_rounded("cpu")


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Calls a function with the tensors of every call of some operators."""

    def __init__(self, names: tuple[str, ...], call) -> None:
        super().__init__()
        self.names, self.call = names, call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split("::")[1].split(".")[0] in self.names:
            self.call([argument for argument in args if isinstance(argument, torch.Tensor)])
        return function(*args, **(kwargs or {}))


def test_bfloat16_networks_and_a_float32_state():
    """Latents, images and gradients are float32; values are as far off as bf16 networks are; decoding undoes encoding."""
    model = tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 2, 2))
    lr, hr = image(1, 3, 4, 4, dtype=torch.float32), image(1, 3, 16, 16, dtype=torch.float32)
    exact = model.nll(hr, lr).detach()
    model.precision = "bf16"
    nll = model.nll(hr, lr)
    assert nll.dtype == torch.float32 and 0 < relative_error(nll.detach(), exact) < 1e-2
    nll.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        latents = model.encode(hr, lr).latents
        assert all(latent.dtype == torch.float32 for latent in latents)
        # the networks round alike in both directions, so what is left is the rounding of the float32 state
        assert (model.decode(latents, lr) - hr).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype):
    """`model.to(dtype)`: the state is stored in it, the operators compute in float32; likelihoods are as far off as that."""
    model = tiny_model(dtype=torch.float32)
    lr, hr = image(1, 3, 4, 4, dtype=torch.float32), image(1, 3, 16, 16, dtype=torch.float32)
    exact = model.nll(hr, lr).detach()
    model = model.to(dtype)
    assert relative_error(model.nll(hr.to(dtype), lr.to(dtype)).detach(), exact) < 3e-2
    with torch.no_grad():
        assert model.sample(lr.to(dtype), n=2, temperature=0.5).isfinite().all()


def test_refused():
    model = tiny_model()
    model.precision = "bf16"
    with pytest.raises(ValueError, match="float64 model needs precision='fp32'"):
        model.nll(image(1, 3, 8, 8), image(1, 3, 2, 2))
    for name in ("engine", "precision"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            setattr(model, name, "fast")
    with pytest.raises(ValueError, match="samples_at_once must be at least 1"):
        NCSR(model.config, samples_at_once=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'presicion'"):
        NCSR(model.config, presicion="bf16")
