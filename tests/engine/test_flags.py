"""PyTorch's global flags for float32 convolutions and products: what they are wherever the package does either, and afterwards.

Which of them rounds anything depends on the processor and on the sizes, so it is the flags that are looked at.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from compat.networks import SMALL
from engine.flags import (
    HR,
    LR,
    PER_OPERATOR,
    SETTINGS,
    WORST,
    Watch,
    exact_on_cpu,
    gradients,
    model_of,
    needs_per_operator,
    nll,
    put_back,
    set_flags,
    values,
)
from operator_cases import marked
from support import image, relative_error, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ncsr_fast import RRDB, accelerate
from ncsr_fast.decoder import Decoder
from ncsr_fast.metrics import imresize, lpips
from ncsr_fast.ops import plain_convolution
from ncsr_fast.ops.conv3x3 import ConvolutionMethod, convolution_backward, convolution_forward
from ncsr_fast.precision import convolutions_are_rounded, products_are_rounded, true_float32

default_flags = pytest.fixture(put_back, autouse=True)


def images(model) -> list[torch.Tensor]:
    with torch.no_grad():
        latents, likelihood, _ = model.encode(HR, LR)
        sampled = model.sample(LR, n=2, temperature=0.5, generator=torch.Generator().manual_seed(0))
        return [*latents, likelihood, model.decode(latents, LR), sampled]


def decoded(model) -> list[torch.Tensor]:
    latents = [0.5 * image(1, *shape, dtype=torch.float32) for shape in model.latent_shapes(4, 4)]
    value = model.decode(latents, LR)
    return [value.detach(), *gradients(model, value.square().mean())]


def initialized(model) -> list[torch.Tensor]:
    return [model.initialize(HR, LR), *(level.actnorm_bias.detach().clone() for level in model.levels)]


def checked(model) -> list[torch.Tensor]:
    report = model.check_invertibility(LR, 0.5, torch.Generator().manual_seed(0))
    return [torch.tensor([step.largest_state for step in report.steps])]


def second_order(model) -> list[torch.Tensor]:
    lr = LR.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.nll(HR, lr).sum(), lr, create_graph=True)
    return [gradient.detach(), *gradients(model, gradient.square().sum())]


def functional(model) -> list[torch.Tensor]:
    def loss(parameters):
        return torch.func.functional_call(model, parameters, (HR, LR)).sum()

    return [g.detach() for g in torch.func.grad(loss)(dict(model.named_parameters())).values()]


def exported(model) -> list[torch.Tensor]:
    decoder = Decoder(model, clip=False)
    return [decoder(*decoder.example(1, 4, 4))]


PASSES = [nll, images, decoded, initialized, checked, second_order, functional, exported]


# the plain engine convolves the same whatever the operators, whose products the others have
@marked("exhaustive", lambda engine, backend: (engine, backend) == ("plain", "native"))
@marked("slow", lambda run, backend: backend == "reference" or run not in (nll, images))
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("engine", ["fused", "plain"])
@pytest.mark.parametrize("run", PASSES, ids=lambda run: run.__name__)
def test_no_pass_of_a_flow_lets_pytorch_round(run, engine, backend):
    """Nor do numbers change, but by roundings of float32: those of TF32, 5e-4, or bfloat16, 4e-3, show on processors that have
    them."""
    expected = run(model_of(engine, backend))
    before = set_flags(WORST)
    with Watch() as watch:
        found = run(model_of(engine, backend))
    assert watch.convolutions > 20 and values() == before
    for value, of in zip(found, expected, strict=True):
        assert relative_error(value, of) < 1e-4 if of.any() else not value.any()


@marked("slow", lambda setting: setting not in ("medium", WORST))
@pytest.mark.parametrize("setting", SETTINGS)
def test_nor_does_a_pass_under_other_flags(setting):
    before = set_flags(setting)
    with Watch() as watch:
        nll(model_of("fused", "reference"))
    assert watch.convolutions > 50 and watch.products > 20 and values() == before


def test_nor_does_an_encoder():
    encoder = RRDB(4, 4, 4, 1, (0,))
    before = set_flags(WORST)
    with Watch() as watch:
        gradients(encoder, encoder(LR).sum())
        gradients(encoder, sum(features.sum() for features in encoder.features(LR)))
        gradients(encoder, sum(features.sum() for features in encoder.pyramid(LR)[0]))
    assert watch.convolutions > 60 and values() == before


@pytest.mark.slow
def test_nor_do_an_accelerated_network_and_its_trial():
    net, arguments = SMALL.build(torch.float32), SMALL.images(torch.float32)
    before = set_flags(WORST)
    with Watch() as watch:
        report = accelerate(net)
        net(**arguments)[1].sum().backward()
        with torch.no_grad():
            net(lr=arguments["lr"], z=image(2, 96, 4, 5).float(), eps_std=0.5, reverse=True, **SMALL.condition(torch.float32))
    assert not report.handed_over and watch.convolutions > 100 and values() == before


def test_nor_does_a_metric():
    expected = imresize(HR, 0.25)
    set_flags(WORST)
    with Watch() as watch:
        assert relative_error(imresize(HR, 0.25), expected) < 1e-6
        lpips(HR, HR[0], lambda x, y: torch.nn.functional.conv2d(x, y[:, :, :3, :3]))
    assert watch.products == 2 and watch.convolutions == 1


# -- who else sees the flags ---------------------------------------------------------------------------------------


def test_what_the_flags_say_can_be_read_inside_a_pass():
    """By hooks of the user's, and by other threads."""

    def read() -> None:
        assert isinstance(torch.backends.cudnn.allow_tf32, bool)
        assert isinstance(torch.backends.cuda.matmul.allow_tf32, bool)
        if PER_OPERATOR:  # before, it is the flag that a pass itself makes exact
            assert torch.get_float32_matmul_precision() == "medium"
        assert products_are_rounded("cpu") and convolutions_are_rounded("cpu")  # as the program has set them

    set_flags("medium")
    model = model_of("fused", "native")
    model.encoder.body[0].register_forward_hook(lambda *_: read())
    with Watch(read) as watch:
        nll(model)
    assert watch.convolutions > 50


IN_A_PROCESS = """
from types import SimpleNamespace

import torch
from ncsr_fast import NCSR, NCSRConfig
from ncsr_fast.precision import true_float32

def cuda_says():
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

of_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
default = cuda_says()
assert default[0] == "tf32"
for precision in ("tf32", "ieee"):  # what nobody set follows what is set for all; what was set stays
    for _ in range(2):
        with true_float32(of_gpu):
            assert set(cuda_says()) == {"ieee"}
            with true_float32(of_gpu):
                pass
            assert set(cuda_says()) == {"ieee"}
    torch.backends.fp32_precision = precision
    assert cuda_says()[0] == precision
    torch.backends.fp32_precision = "none"
    assert cuda_says() == default
torch.backends.cudnn.conv.fp32_precision = "tf32"
with true_float32(of_gpu):
    assert set(cuda_says()) == {"ieee"}
torch.backends.fp32_precision = "ieee"
assert cuda_says() == ("tf32", "ieee")

def enter_flags(*_):
    with torch.backends.cudnn.flags(enabled=True):
        pass

torch.backends.fp32_precision, torch.backends.cudnn.allow_tf32 = "none", True
config = NCSRConfig(scale=4, channels=4, growth=2, blocks=1, stacked_blocks=(), steps=1, hidden_channels=4)
model = NCSR(config)
model.encoder.body[0].register_forward_hook(enter_flags)
model(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 4, 4)).sum().backward()
"""


@pytest.mark.slow
@needs_per_operator
def test_cudnn_flags_are_what_they_were(tmp_path):
    """Inherited ones too. In a process of its own: the default of cuDNN's cannot be put back."""
    subprocess.run([sys.executable, "-c", IN_A_PROCESS], check=True, cwd=tmp_path)


@pytest.mark.parametrize("entered_again", [False, True])
def test_a_flag_that_is_set_meanwhile_stays(entered_again):
    high = set_flags("high")
    set_flags("medium")
    with true_float32(LR):
        assert exact_on_cpu()
        set_flags("high")
        if entered_again:
            with true_float32(LR):
                assert exact_on_cpu()
            assert exact_on_cpu() and products_are_rounded("cpu")
    assert values() == high and torch.get_float32_matmul_precision() == "high"


def test_passes_of_other_dtypes_change_no_flag():
    before = set_flags("medium")
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        with true_float32(LR.to(dtype)):
            assert values() == before


def test_flags_are_put_back_after_an_error():
    before = set_flags(WORST)
    with pytest.raises(KeyError), true_float32(LR):
        raise KeyError
    assert values() == before


def test_the_convolution_whose_flag_is_an_argument():
    """What runs on a GPU; there, its last argument decides."""
    x, weight, bias = image(2, 6, 5, 7, dtype=torch.float32), image(4, 6, 3, 3, seed=1).float(), image(4, seed=2).float()
    expected = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    for allowed in (False, True):
        assert torch.equal(plain_convolution.convolve_by_cudnn(x, weight, bias, allowed), expected)


@needs_per_operator
@pytest.mark.parametrize("precision, backward", [("fp32", "ieee"), ("tf32", "tf32")])
def test_what_a_gpu_is_asked_for(precision, backward, monkeypatch):
    """Forward, the argument says it and no flag is changed; backward, the flag is. Tensors without memory will do."""
    monkeypatch.setattr(plain_convolution, "has_cudnn", lambda: True)
    seen = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((function, args[-1], torch.backends.cudnn.conv.fp32_precision))
            return function(*args, **(kwargs or {}))

    method = ConvolutionMethod(precision == "tf32")
    with FakeTensorMode():
        x, weight = torch.empty(1, 3, 8, 8, device="cuda"), torch.empty(4, 3, 3, 3, device="cuda")
        with Calls():
            y = convolution_forward(x, weight, None, method)
            convolution_backward(y, x, weight, (True, True, False), method)
    aten, default = torch.ops.aten, torch.backends.cudnn.conv.fp32_precision
    assert (aten._convolution.default, precision == "tf32", default) in seen
    assert (aten.convolution_backward.default, [True, True, False], backward) in seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_precision_on_a_gpu(precision):
    """Whatever the flags: true float32 is as near to float64 as that, TF32 is not."""
    torch.backends.cudnn.allow_tf32 = precision == "fp32"  # the other way round
    expected = tiny_model(channels=16, growth=16).cuda().nll(HR.double().cuda(), LR.double().cuda())
    model = tiny_model(dtype=torch.float32, channels=16, growth=16).cuda()
    model.precision = precision
    error = relative_error(model.nll(HR.cuda(), LR.cuda()).detach(), expected.detach())
    assert error < 1e-5 if precision == "fp32" else error > 1e-5
