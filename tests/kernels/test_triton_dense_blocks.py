"""The encoder's residual blocks in Triton on their own and in the encoder: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import random

import installation
import pytest
import torch
import torch.nn.functional as F
from operator_cases import marked
from support import Watch
from torch import Tensor

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

from ncsr_fast import kernels  # noqa: E402
from ncsr_fast.encoder.rrdb import RRDB  # noqa: E402
from ncsr_fast.kernels import _conv3x3, _conv3x3_weight, conv3x3, dense_blocks  # noqa: E402
from ncsr_fast.ops import reference  # noqa: E402
from ncsr_fast.ops.backend import kernels as functions  # noqa: E402
from ncsr_fast.ops.conv3x3 import ConvolutionMethod  # noqa: E402
from ncsr_fast.ops.plain_dense_blocks import DenseBlocks  # noqa: E402

pytestmark = pytest.mark.slow  # in `make check` the encoder runs by its reference
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE, HALF = torch.float32, torch.float16  # the interpreter multiplies bfloat16 wrongly
LAST = torch.channels_last
TRITON = ConvolutionMethod(backend="triton")
WEIGHTS = {"conv3x3_weight_kernel", "sum_dense_block_partials_kernel"}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel should write starts as NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocate(*a, **k).fill_(float("nan")))


class Case:
    """Residual blocks of a form, with numbers drawn by a seed.

    Numbers of the parameters are those of half precision, and so they are times a residual of 1/4: no kernel rounds them.
    """

    def __init__(self, seed: int, dtype: torch.dtype = SINGLE, **changes: object) -> None:
        pick = random.Random(seed).choice
        sizes = {"channels": pick([8, 16, 3]), "growth": pick([4, 8, 5]), "size": pick([(3, 5), (1, 1), (2, 7)])}
        sizes |= {"blocks": pick([1, 2]), "dense": pick([1, 2, 3]), "convolutions": pick([1, 2, 3]), "batch": pick([1, 2])}
        self.__dict__ |= sizes | changes
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        of_one = [(self.growth, self.channels + i * self.growth) for i in range(self.convolutions - 1)]
        of_one += [(self.channels, self.channels + (self.convolutions - 1) * self.growth)]
        shapes = of_one * (self.blocks * self.dense)
        self.weights = [self.normal(*shape, 3, 3).div((9 * shape[1]) ** 0.5).half().float() for shape in shapes]
        self.biases = [self.normal(outputs).half().float() for outputs, _ in shapes]
        self.x = self.image()
        self.form = DenseBlocks(self.dense, self.convolutions, tuple(range(self.blocks)), 0.25, 0.25)
        # every convolution rounds what it writes, and passes on the roundings of those before as it does their sum
        terms = 9 * of_one[-1][1]
        once = (terms**0.5 / 2 + 4) * torch.finfo(SINGLE).eps + (torch.finfo(dtype).eps / 2 if dtype != SINGLE else 0)
        self.allowed = len(shapes) * once

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE)

    def image(self) -> Tensor:
        return self.normal(self.batch, self.channels, *self.size).to(self.dtype).contiguous(memory_format=LAST)

    def forward(self, **options: object) -> tuple[list[Tensor], Tensor | None]:
        return kernels.dense_blocks_forward(self.x, self.weights, self.biases, self.form, **options)

    def backward(self, grads: list[Tensor], saved: Tensor, needed=(True, True)) -> tuple[Tensor | None, list[Tensor]]:
        return kernels.dense_blocks_backward(grads, saved, self.weights, self.biases, self.form, needed)

    def exact(self) -> tuple[list[Tensor], list[Tensor], DenseBlocks]:
        """The rest of the arguments in float64."""
        return [w.double() for w in self.weights], [b.double() for b in self.biases], self.form


def assert_close(value: Tensor, expected: Tensor, allowed: float, what: str) -> None:
    assert value.shape == expected.shape, what
    error = float((value.double() - expected).abs().max() / expected.abs().max())
    assert error <= allowed, f"{what}: {error:.1e} > {allowed:.1e}"  # also red for NaN


def by_definition(x: Tensor, parameters: list[Tensor], form: DenseBlocks) -> list[Tensor]:
    pairs, outputs, start = iter(zip(parameters[::2], parameters[1::2])), [], x
    for index in range(len(parameters) // (2 * form.convolutions)):
        features = [x]
        for number in range(form.convolutions):
            y = F.conv2d(torch.cat(features, dim=1), *next(pairs), padding=1)
            features.append(F.leaky_relu(y, form.slope) if number < form.convolutions - 1 else y)
        x = x + form.residual * features[-1]
        if index % form.dense == form.dense - 1:
            start = x = start + form.residual * x
            outputs.append(x)
    return outputs


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_is_the_definition(seed):
    """In float64, gradients by autograd of the definition included."""
    case = Case(seed)
    weights, biases, form = case.exact()
    pairs = [tensor.requires_grad_() for pair in zip(weights, biases) for tensor in pair]
    x = case.x.double().requires_grad_()
    expected = by_definition(x, pairs, form)
    grads = [case.image().double() for _ in expected]
    with torch.no_grad():
        found, saved = reference.dense_blocks_forward(x, weights, biases, form)
        dx, parameters = reference.dense_blocks_backward(grads, saved, weights, biases, form, (True, True))
        assert reference.dense_blocks_forward(x, weights, biases, form, saves=False)[1] is None
    right = torch.autograd.grad(expected, [x, *pairs], grads)
    for value, each in zip([*found, dx, *parameters], [*expected, *right], strict=True):
        assert_close(value, each.detach(), 1e-13, "reference")


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("seed", range(12))
@marked("exhaustive", lambda seed, dtype: (seed, dtype) != (3, HALF))
def test_any_form(seed, dtype):
    """Odd sizes and one pixel, channels that no tile divides; backward from what was saved, so that ReLUs agree."""
    case = Case(seed, dtype)
    outputs, saved = case.forward()
    expected, right_saved = reference.dense_blocks_forward(case.x.double(), *case.exact())
    for value, right in zip([*outputs, saved], [*expected, right_saved], strict=True):
        assert value.dtype == dtype and value.stride(1) == 1
        assert_close(value, right, case.allowed, "forward")
    without, nothing = case.forward(saves=False)
    assert nothing is None and all(map(torch.equal, without, outputs))

    grads = [case.image() for _ in outputs]
    dx, found = case.backward(grads, saved)
    exact = [grad.double() for grad in grads], saved.double(), *case.exact()
    right_dx, right_found = reference.dense_blocks_backward(*exact, (True, True))
    assert dx.dtype == dtype
    assert_close(dx, right_dx, case.allowed, "dx")
    for value, right in zip(found, right_found, strict=True):
        assert value.dtype == SINGLE
        # beside the roundings of the gradients of what the convolutions put out, sums over all pixels
        sums = (grads[0][:, 0].numel() ** 0.5 / 2 + 4) * torch.finfo(SINGLE).eps
        assert_close(value, right, case.allowed + sums, "parameters")


def test_a_residual_that_half_precision_rounds():
    """0.2, and its square at the end of a residual block, by which weights and gradients are multiplied in float32."""
    case = Case(3, blocks=1, dense=2, convolutions=2)
    case.form = case.form._replace(residual=0.2, slope=0.2)
    (output,), saved = case.forward()
    (expected,), _ = reference.dense_blocks_forward(case.x.double(), *case.exact())
    assert_close(output, expected, case.allowed, "forward")
    grad = case.image()
    found = case.backward([grad], saved)
    right = reference.dense_blocks_backward([grad.double()], saved.double(), *case.exact(), (True, True))
    for value, each in zip([found[0], *found[1]], [right[0], *right[1]], strict=True):
        assert_close(value, each, 2 * case.allowed, "backward")


def launches(monkeypatch, call) -> tuple[list[str], set[str]]:
    """The kernels that a call starts, in their order, and the operators of PyTorch that compute."""
    started, computed = [], set()
    for module in (conv3x3, _conv3x3, _conv3x3_weight, dense_blocks):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: started.append(kernel.fn.__name__))
    with Watch(lambda name, _: computed.add(name)):
        call()
    nothing = {"slice", "select", "unbind", "split", "split_with_sizes", "view", "permute", "empty", "empty_like", "fill_"}
    return started, {name for name in computed if name.removeprefix("aten::") not in nothing}


def test_launches(monkeypatch):
    """A launch a convolution in each direction, and three a residual block and pass besides: no copies but of x and dy."""
    case = Case(0, blocks=2, dense=3, convolutions=5, channels=8, growth=4)
    saved, grads = torch.zeros(6 * case.batch, 24, *case.size), [case.image(), case.image()]
    convolutions = ["conv3x3_kernel"] * 30
    started, computed = launches(monkeypatch, case.forward)
    assert (started, computed) == (["pack_dense_blocks_kernel", *convolutions], {"aten::copy_"})
    started, computed = launches(monkeypatch, lambda: case.backward(grads, saved))
    of_block = [*convolutions[:15], "conv3x3_weight_kernel", "sum_dense_block_partials_kernel"]
    assert (started, computed) == (["pack_dense_blocks_kernel", *of_block * 2], {"aten::copy_"})


def test_only_what_is_needed_is_computed(monkeypatch):
    """Of two blocks the values; of a frozen encoder no gradient of a weight; of a constant x none of the first input."""
    case = Case(0, blocks=2, dense=1, convolutions=2, channels=8, growth=4)
    grads, (outputs, saved) = [case.image(), case.image()], case.forward()
    dx, found = case.backward(grads, saved)
    expected, _ = reference.dense_blocks_forward(case.x.double(), *case.exact())
    right_dx, right = reference.dense_blocks_backward(
        [grad.double() for grad in grads], saved.double(), *case.exact(), (True, True)
    )
    sums = (grads[0][:, 0].numel() ** 0.5 / 2 + 4) * torch.finfo(SINGLE).eps  # as in `test_any_form`
    for value, each in zip([*outputs, dx, *found], [*expected, right_dx, *right], strict=True):
        assert_close(value, each, case.allowed + sums, "values")
    assert torch.equal(case.backward(grads, saved, (True, False))[0], dx)
    nothing, again = case.backward(grads, saved, (False, True))
    assert nothing is None and all(map(torch.equal, again, found))
    started, _ = launches(monkeypatch, lambda: case.backward(grads, saved, (True, False)))
    assert started == ["pack_dense_blocks_kernel", *["conv3x3_kernel"] * 4]
    started, _ = launches(monkeypatch, lambda: case.backward(grads, saved, (False, True)))
    assert started.count("conv3x3_kernel") == 3


def test_weights_that_several_launches_take_and_in_other_layouts(monkeypatch):
    """More weights than a launch takes, channels-last ones, another dtype, and one whose memory does not hold its values."""
    case = Case(2, blocks=1, dense=2, convolutions=3)

    def packed(weights: list[Tensor]) -> list[Tensor]:
        weight, bias = dense_blocks._packed(weights, case.biases, case.form, case.channels, SINGLE)
        return [weight.nan_to_num(7.5), bias]

    weights = case.weights
    expected = packed(weights)
    monkeypatch.setattr(dense_blocks, "TAKEN", 4)
    others = [[w.contiguous(memory_format=LAST) for w in weights], [w.half() for w in weights]]
    for other in (*others, [torch._neg_view(-weights[0]), *weights[1:]], weights):
        assert all(map(torch.equal, packed(other), expected))


def test_the_same_bits_and_any_number_of_parts(monkeypatch):
    """The gradients of weights over one part of all pixels, and over several, of which the last has less."""
    case = Case(1, blocks=1, dense=2, convolutions=2, size=(1, 20), batch=1)
    (_,), saved = case.forward()
    grad = case.image()
    _, right = reference.dense_blocks_backward([grad.double()], saved.double(), *case.exact(), (True, True))
    monkeypatch.setitem(_conv3x3_weight.OPTIONS["ieee"], "BLOCK_P", 16)
    for programs in (1, 9 * 2 * 2):
        monkeypatch.setattr(_conv3x3_weight, "PROGRAMS", programs)
        first, second = (case.backward([grad], saved)[1] for _ in range(2))
        assert all(map(torch.equal, first, second))
        for value, expected in zip(first, right, strict=True):
            assert_close(value, expected, 2 * case.allowed, "parameters")


def test_empty():
    case = Case(0, blocks=1, dense=1, convolutions=2, batch=0)
    (output,), saved = case.forward()
    dx, found = case.backward([output], saved)
    assert output.shape == dx.shape == case.x.shape and not any(gradient.any() for gradient in found)


def test_what_is_refused():
    case = Case(0)
    case.x = case.x.double()
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        case.forward()


def outcome(net: RRDB, lr: Tensor, method: ConvolutionMethod | None) -> list[Tensor]:
    """Features, and gradients of image and parameters."""
    lr, parameters = lr.clone().requires_grad_(), [p for p in net.parameters() if p.requires_grad]
    pyramid, stacked = net.pyramid(lr, method)
    features = [*pyramid, *([] if stacked is None else [stacked])]
    total = sum((each * (1 + i)).square().mean() for i, each in enumerate(features))
    return [*features, *torch.autograd.grad(total, [lr, *parameters])]


@pytest.mark.parametrize("stacked", [(0, 1), (0,), ()], ids=str)
@pytest.mark.exhaustive
def test_the_encoder(monkeypatch, stacked):
    """Stacked blocks, of which the last may be one or not; the same without gradients, and of a frozen encoder."""
    torch.manual_seed(0)
    net = RRDB(2, 8, 4, 2, stacked, long_skip="last_block").to(DEVICE)
    for module in net.head():
        module.requires_grad_(False)
    lr = torch.rand(1, 3, 2, 4, device=DEVICE).contiguous(memory_format=LAST)
    called = []
    forward = kernels.dense_blocks_forward
    monkeypatch.setattr(kernels, "dense_blocks_forward", lambda *a, **k: called.append(k["saves"]) or forward(*a, **k))
    functions.cache_clear()  # which holds what is replaced
    found, expected = outcome(net, lr, TRITON), outcome(net.double(), lr.double(), None)
    for value, right in zip(found, expected, strict=True):
        # of some 34 convolutions one after the other, each rounded as the terms of its sums
        assert_close(value, right, 2 * 34 * (216**0.5 / 2 + 4) * torch.finfo(SINGLE).eps, "encoder")
    with torch.no_grad():
        pyramid, features = net.float().pyramid(lr, TRITON)
    assert all(map(torch.equal, [*pyramid, *([] if features is None else [features])], found))
    assert called == [True, False]
    functions.cache_clear()


def test_noise_and_residuals_inside_dense_blocks_go_block_by_block(monkeypatch):
    """As the formula of the kernels has neither; and the noise is drawn as often as there are dense blocks."""
    lr, drawn = torch.rand(1, 3, 2, 4, device=DEVICE), []
    monkeypatch.setattr(kernels, "dense_blocks_forward", None)
    net = RRDB(2, 4, 4, 1, training_noise="dense").to(DEVICE)
    for dense in net.body[0].dense_blocks():
        dense.noise.draw = lambda y: drawn.append(1) or torch.zeros_like(y)
    net.train().pyramid(lr, TRITON)
    assert drawn == [1, 1, 1]
    RRDB(2, 4, 4, 1, dense_residual=True).to(DEVICE).pyramid(lr, TRITON)
