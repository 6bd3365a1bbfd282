"""A coupling with its network and the maps behind it in Triton: on a GPU, or in the interpreter on the CPU, beside float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import installation
import pytest
import torch
from layouts import LAYOUTS
from operator_cases import interpreted, marked
from support import Watch
from torch import Tensor

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

from ncsr_fast import kernels  # noqa: E402
from ncsr_fast.kernels import _step_network, coupled_step, flow_step, step_network  # noqa: E402
from ncsr_fast.ops import reference  # noqa: E402
from ncsr_fast.ops.coupled_step import Step, peaks, total  # noqa: E402

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
SINGLE, HALF = torch.float32, torch.float16
# Triton's interpreter multiplies bfloat16 wrongly: float16 stands for both
DTYPES = [SINGLE, HALF] if interpreted("triton") else [SINGLE, HALF, torch.bfloat16]
EPS = 1e-4
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
directions = pytest.mark.parametrize("inverse", [False, True], ids=["encoding", "decoding"])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel should write starts as NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocate(*a, **k).fill_(float("nan")))


@pytest.fixture
def inside(monkeypatch):
    """The first layers are in the kernel, of regions that a few programs share."""
    monkeypatch.setattr(coupled_step, "PROGRAMS", 2)
    monkeypatch.setattr(coupled_step, "ROUNDS", 0)


def tensors(
    channels: int, size=(5, 7), batch: int = 2, dtype=HALF, hidden: int = 16, mixed: bool = True, injected: bool = True
) -> list[Tensor | None]:
    """x, pre, the network, mix, offset and injector in the engine's layout; activations of about 1."""
    generator, half = torch.Generator().manual_seed(channels + hidden), channels // 2

    def normal(*shape: int, variance: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul(variance**0.5).to(DEVICE)

    def picture(c: int) -> Tensor:
        return normal(batch, c, *size).to(memory_format=LAST)

    x, pre, injector = picture(channels), picture(3 * hidden).to(dtype)[:, hidden : 2 * hidden], picture(2 * channels).to(dtype)
    outputs = 2 * (channels - half)
    w1, w2 = normal(hidden, half, 3, 3, variance=1 / (9 * half)), normal(hidden, hidden, 1, 1, variance=1 / hidden)
    w3, b3 = normal(outputs, hidden, 3, 3, variance=1 / (9 * hidden)), normal(outputs)
    mix, offset = torch.linalg.qr(normal(channels, channels))[0], normal(channels)
    network = [weight.to(dtype) for weight in (w1, w2, 0.5 + normal(hidden), w3, b3)]
    return [x, pre, *network, *((mix, offset, injector if injected else None) if mixed else (None, None, None))]


def run(given: list[Tensor | None], inverse: bool, **options) -> Step:
    return Step(*kernels.step_network_coupled(*given, EPS, inverse, **options))


def exact(given: list[Tensor | None], inverse: bool) -> Step:
    """In float64 from the same numbers, those that the network reads rounded to its dtype."""
    x, pre, *rest = given
    half = x.shape[1] // 2
    read = [None if tensor is None else tensor.double() for tensor in (x, pre, *rest)]
    z1 = x[:, :half].to(pre.dtype).double()
    h = reference.step_network_forward(z1, *read[1:7])
    step = reference.step_network_coupled(read[0], *read[1:7], *read[7:], EPS, inverse)
    # the network of the formula would read a z1 that is not rounded
    y, logdet = reference.affine_forward(read[0], h, half, EPS, inverse)
    if rest[5] is not None:
        before, after = (read[9], None) if inverse else (None, read[9])
        y, other = reference.flow_step_forward(y, read[7], read[8], before, after, EPS, inverse)
        logdet = logdet + other
    return Step(y, (logdet,), step[2], h)


def allowed(given: list[Tensor | None], tf32: bool = False) -> float:
    """Of the error of shift and raw scale, beside the largest of them: see `test_triton_step_network`, but that the third layer
    is not rounded to half precision."""
    hidden, half = given[2].shape[:2]
    longest = 9 * max(hidden, half)
    sums = longest**0.5 * torch.finfo(SINGLE).eps
    return sums + (torch.finfo(given[1].dtype).eps if given[1].dtype != SINGLE else 6 * 2**-11 if tf32 else 0)


class Bounded(NamedTuple):
    """A state in float64, how far float32 may be from each of its numbers, and from the log-det of a sample."""

    value: Tensor
    error: Tensor
    logdet: Tensor


def affine(state: Bounded, h: Tensor, inverse: bool, error: float = 0.0) -> Bounded:
    """After y = (x + t)·s or y = x/s - t on the last channels, with h = (t, r), each of which is off by `error`.

    With v the scaled value, |dy| ≤ (1 + eps + |v|)·error, as d(log s) ≤ dr, and |dx|·s or |dx|/s. Rounding: of r + 2 by |r| + 2
    halves of an eps, which s and v are off by as its exponential is, and eight operations of half an eps besides. The log-det
    sums log s, each off as s is; each of n additions rounds, half an eps up or down as it comes.
    """
    half_eps = torch.finfo(SINGLE).eps / 2
    t, r = h[:, 0::2].double(), h[:, 1::2].double()
    kept = state.value.shape[1] - t.shape[1]
    x, off, s = state.value[:, kept:], state.error[:, kept:], torch.sigmoid(r + 2) + EPS
    v = x / s if inverse else (x + t) * s
    y, by_input = (v - t, off / s) if inverse else (v, off * s)
    rounding = (10 + r.abs()) * half_eps
    changed = by_input + (1 + EPS + v.abs()) * error + rounding * (v.abs() + y.abs())
    terms = (error + rounding + s.log().abs() * (4 + s[0].numel() ** 0.5) * half_eps).sum(dim=(1, 2, 3))
    value, errors = (torch.cat([before[:, :kept], after], 1) for before, after in zip(state[:2], (y, changed)))
    return Bounded(value, errors, state.logdet + terms)


def mixed(state: Bounded, mix: Tensor, offset: Tensor) -> Bounded:
    """After mix·x + offset: a sum of C + 1 terms, of which each addition and product rounds by half an eps at most."""
    mix, offset = mix.double(), offset.double()[:, None, None]
    magnitude = torch.einsum("oc,bchw->bohw", mix.abs(), state.value.abs()) + offset.abs()
    rounding = (len(mix) + 2) * torch.finfo(SINGLE).eps / 2 * magnitude
    value = torch.einsum("oc,bchw->bohw", mix, state.value) + offset
    return Bounded(value, torch.einsum("oc,bchw->bohw", mix.abs(), state.error) + rounding, state.logdet)


def bounded(given: list[Tensor | None], inverse: bool, h: Tensor, error: float) -> Bounded:
    """The coupled step in float64, of a network whose outputs are h within `error`."""
    x, (mix, offset, injector) = given[0].double(), given[7:]
    state = affine(Bounded(x, torch.zeros_like(x), x.new_zeros(len(x))), h, inverse, error)
    if injector is not None and inverse:
        state = affine(state, injector, inverse)
    if mix is not None:
        state = mixed(state, mix, offset)
    return affine(state, injector, inverse) if injector is not None and not inverse else state


def assert_like_the_formula(given: list[Tensor | None], inverse: bool, **options) -> Step:
    """y, log-det, peak and output, of the parts that are wanted, each number within its own bound."""
    found, right = run(given, inverse, **options), exact(given, inverse)
    error = allowed(given, options.get("tf32", False)) * float(right.output.abs().max())
    bounds = bounded(given, inverse, right.output, error)
    assert found.y.dtype == given[0].dtype and found.y.is_contiguous(memory_format=LAST)
    assert ((found.y - right.y).abs() <= bounds.error).all()
    assert ((total(found.logdets) - right.logdets[0]).abs() <= bounds.logdet).all()
    if options.get("watched"):
        assert torch.equal(peaks([found.peak])[0], found.y.abs().amax(dim=(1, 2, 3)))
    if options.get("with_output"):
        rounded = torch.finfo(given[1].dtype).eps / 2 * float(right.output.abs().max())
        assert found.output.dtype == given[1].dtype and (found.output - right.output).abs().max() <= error + rounded
    return found


@dtypes
@directions
@pytest.mark.parametrize("channels", [12, pytest.param(24, marks=pytest.mark.exhaustive), 48, 5])
def test_channels(channels, inverse, dtype):
    """Those whose mix is in the kernel and others; several blocks of h2, and filled up ones."""
    hidden = {12: 64, 48: 33}.get(channels, 16)
    given = tensors(channels, (2, 3), 1, dtype, hidden)
    assert_like_the_formula(given, inverse, watched=True, with_output=True)


@directions
@pytest.mark.parametrize("mixed, injected", [(False, False), (True, False)])
def test_parts(mixed, injected, inverse):
    """The coupling alone, and without an injector."""
    assert_like_the_formula(tensors(6, (9, 17), 2, HALF, mixed=mixed, injected=injected), inverse)


@pytest.mark.parametrize("size", [(1, 1), (1, 19), (9, 1), (8, 16), (17, 33)], ids=str)
def test_sizes(size, inside):
    """Of regions with their border: parts of one, and more than one."""
    assert_like_the_formula(tensors(6, size, 1, HALF), True, watched=True)


@directions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@marked("exhaustive", lambda dtype, inverse: inverse or dtype != HALF)
def test_the_first_layers_inside_or_outside(dtype, inverse, monkeypatch, request):
    """To the bit the same: regions of a loop, three samples of two programs, shared pre-activations and injector."""
    given = tensors(12, (9, 17), 3, dtype)
    given[1], given[9] = (given[i][:1].expand(3, -1, -1, -1) for i in (1, 9))
    outside = run(given, inverse, watched=True, with_output=True)
    request.getfixturevalue("inside")
    within = run(given, inverse, watched=True, with_output=True)
    for found, expected in zip(
        (within.y, *within.logdets, within.peak, within.output), (outside.y, *outside.logdets, outside.peak, outside.output)
    ):
        assert torch.equal(found, expected)


def test_launches(monkeypatch, inside):
    """One, without copies; and what is there where the state has too many channels, or the regions are few."""
    launched, computed = [], []
    for module in (_step_network, coupled_step, flow_step, step_network):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    given = tensors(12, (17, 33))
    packed = [stack[0] for stack in kernels.step_network_weights(given[2][None], given[3][None], given[5][None], HALF)]
    launched.clear()
    with Watch(lambda name, _: computed.append(name)):
        run(given, True, packed=packed)
    assert launched == ["coupled_step_kernel"]
    assert set(computed) <= {"aten::empty", "aten::empty_like", "aten::fill_", "aten::select", "aten::slice"}
    launched.clear()
    monkeypatch.setattr(coupled_step, "ROUNDS", 1000)
    monkeypatch.setattr(coupled_step, "MIXED", 11)
    run(given, True, packed=packed)
    assert launched == ["hidden_kernel", "coupled_step_kernel", "flow_step_forward_kernel"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_undoes_encoding(dtype):
    """In the precision of float32, whatever the network's, which computes the same shift and scale from the same z1.

    Injector and mix are undone in float64: |mix⁻¹| and 1/s enlarge what they rounded. z1 is replaced by itself, so that no
    number of it is rounded to its neighbour in the network's dtype; and z2 is off by that, and by two affine maps' rounding.
    """
    given = tensors(12, (9, 17), 2, dtype)
    x, mix, offset, injector = given[0], *given[7:]
    encoded, h = run(given, False, with_output=True), exact(given, False).output
    undone = torch.linalg.inv(mix.double())
    z, logdet = reference.flow_step_forward(
        encoded.y.double(), undone, -undone @ offset.double(), injector.double(), None, EPS, True
    )
    bounds = bounded(given, False, h, 0.0)
    error = bounds.error / (torch.sigmoid(injector[:, 1::2].double() + 2) + EPS)
    error = torch.einsum("oc,bchw->bohw", undone.abs(), error)
    assert ((z[:, :6] - x[:, :6]).abs() <= error[:, :6]).all()
    coupled = torch.cat([x[:, :6], z[:, 6:].float()], dim=1)
    decoded = run([coupled, *given[1:7], None, None, None], True)
    start = Bounded(coupled.double(), error + torch.finfo(SINGLE).eps / 2 * coupled.abs(), bounds.logdet)
    back = affine(start, h, True)
    assert torch.equal(decoded.y[:, :6], x[:, :6]) and ((decoded.y - x).abs() <= back.error).all()
    added = total(encoded.logdets) + logdet + total(decoded.logdets)
    assert (added.abs() <= back.logdet).all()


def test_same_bits_every_time_and_in_every_batch(inside):
    given = tensors(6, (9, 17), 2, HALF)
    first, again = (run(given, True, watched=True) for _ in range(2))
    assert torch.equal(first.y, again.y) and torch.equal(first.logdets[0], again.logdets[0])
    alone = [x[1:] if x is not None and x.dim() == 4 and x.shape[2:] == (9, 17) else x for x in given]
    assert torch.equal(run(alone, True).y, first.y[1:])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_peaks_of_what_is_not_finite(value, inside):
    given = tensors(6, (9, 17), 2, HALF)
    given[0] = given[0].clone()
    given[0][1, 4, 3, 5] = value
    found = run(given, True, watched=True)
    peak = peaks([found.peak])[0]
    assert peak[0].isfinite() and not peak[1].isfinite()
    assert found.y[0].isfinite().all()


def test_peaks_are_those_of_the_pixels():
    """Beside the image a tile has the offset alone, which is larger here than any pixel, each scaled down by the injector."""
    given = tensors(6, (1, 1), 1, HALF)
    given[9] = torch.zeros_like(given[9])
    given[9][:, 1::2] = -20
    found = run(given, False, watched=True)
    assert torch.equal(peaks([found.peak])[0], found.y.abs().amax(dim=(1, 2, 3)))


@pytest.mark.parametrize("layout", ["contiguous", "channels of channels_last"])
def test_layouts(layout):
    given = tensors(6, (5, 7), 2, SINGLE)
    lying = [LAYOUTS[layout](x) if x is not None and x.dim() == 4 and x.shape[2:] == (5, 7) else x for x in given]
    found, expected = run(lying, False), run(given, False)
    assert torch.allclose(found.y, expected.y, rtol=0, atol=1e-5 * float(expected.y.abs().max()))


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_empty(shape, monkeypatch):
    launched: list[Callable] = []
    for module in (_step_network, coupled_step, flow_step, step_network):
        monkeypatch.setattr(module, "launch", lambda *a, **k: launched.append(a))
    batch, *size = shape
    found = run(tensors(6, size, batch), False, with_output=True)
    assert found.y.shape == (batch, 6, *size) and total(found.logdets).tolist() == [0.0] * batch and not launched


def far_apart(x: Tensor, dimension: int) -> Tensor:
    """x with 2³⁰ elements from an index of a dimension to the next, in memory of which hardly any is touched."""
    strides = [2**30 if each == dimension else stride for each, stride in enumerate(x.contiguous().stride())]
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, strides)) + 1
    storage = torch.UntypedStorage(reach * x.element_size(), device=x.device)
    return torch.tensor([], dtype=x.dtype, device=x.device).set_(storage, 0, x.shape, strides).copy_(x)


@pytest.mark.parametrize("dimension", [0, pytest.param(2, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("index", [0, 1, 9], ids=["x", "pre", "injector"])
def test_offsets_beyond_32_bits(index, dimension, inside):
    given = tensors(4, (3, 3), 3, HALF)
    given[0], given[9] = given[0].half(), given[9].half()
    expected = run(given, False)
    given[index] = far_apart(given[index], dimension)
    found = run(given, False)
    bound = 4 * torch.finfo(HALF).eps * float(expected.y.abs().max())  # sums are in another order
    assert (found.y.float() - expected.y.float()).abs().max() <= bound
