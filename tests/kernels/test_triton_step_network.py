"""The network of an injector or a coupling in Triton: on a GPU, or in the interpreter on the CPU, in float64's presence."""

from __future__ import annotations

import installation
import pytest
import torch
import torch.nn.functional as F
from layouts import IMAGES, LAYOUTS
from operator_cases import ROUNDING, assert_close, interpreted, marked
from support import Watch, image, relative_error, tiny_model
from torch import Tensor

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

from ncsr_fast import kernels, ops  # noqa: E402
from ncsr_fast.engine import plan  # noqa: E402
from ncsr_fast.kernels import _step_network  # noqa: E402
from ncsr_fast.kernels import step_network as triton_network  # noqa: E402
from ncsr_fast.ops.backend import kernels as functions_of  # noqa: E402
from ncsr_fast.ops.step_network import StepNetwork, evaluate_network  # noqa: E402

pytestmark = pytest.mark.slow  # in `make check` the tests of the operators run these kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
SINGLE, HALF = torch.float32, torch.float16
# Triton's interpreter multiplies bfloat16 wrongly: float16 stands for both
DTYPES = [SINGLE, HALF] if interpreted("triton") else [SINGLE, HALF, torch.bfloat16]
Tensors = list[Tensor | None]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel should write starts as NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocate(*a, **k).fill_(float("nan")))


def network(channels: int, hidden: int, outputs: int, size=(5, 7), batch: int = 2, dtype=SINGLE) -> Tensors:
    """z1, pre, w1, w2, b2, w3, b3 in the engine's layout, activations of about 1; b2 is positive on average, unlike the zeros
    around h2. z1 is the first half of a float32 state, pre some of the pre-activations of several networks."""
    generator = torch.Generator().manual_seed(channels + 100 * hidden + outputs)

    def normal(*shape: int, variance: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul(variance**0.5).to(DEVICE)

    state, source = (normal(batch, c, *size).to(memory_format=LAST) for c in (2 * channels or 1, 3 * hidden))
    w1 = normal(hidden, channels, 3, 3, variance=1 / (9 * channels)) if channels else None
    w2, b2 = normal(hidden, hidden, 1, 1, variance=1 / hidden), 0.5 + normal(hidden)
    w3, b3 = normal(outputs, hidden, 3, 3, variance=1 / (9 * hidden)), normal(outputs)
    rest = [None if x is None else x.to(dtype) for x in (w1, w2, b2, w3, b3)]
    return [state[:, :channels] if channels else None, source.to(dtype)[:, hidden : 2 * hidden], *rest]


def formula(z1, pre, w1, w2, b2, w3, b3) -> tuple[Tensor, Tensor, Tensor]:
    """h1, h2 and h in float64 from the same numbers, z1 rounded to the dtype of pre as the contract has it."""
    z1 = None if z1 is None else z1.to(pre.dtype)
    z1, pre, w1, w2, b2, w3, b3 = (None if x is None else x.double() for x in (z1, pre, w1, w2, b2, w3, b3))
    h1 = F.relu(pre if z1 is None else pre + F.conv2d(z1, w1, padding=1))
    h2 = F.relu(F.conv2d(h1, w2, b2))
    return h1, h2, F.conv2d(h2, w3, b3, padding=1)


def allowed(tensors: Tensors, tf32: bool = False) -> float:
    """Of the largest magnitude of a layer.

    Each of n additions in float32 rounds a partial sum, which is no larger than the largest result, by half an eps at most, up
    or down as it comes: some ½√n eps in all. Twice that, for three sums after one another. Half precision also rounds three
    layers, by half an eps each, and TF32 the operands of three products, both of which by 2⁻¹¹.
    """
    dtype, longest = tensors[1].dtype, max(9 * x.shape[1] for x in (tensors[0], tensors[5]) if x is not None)
    sums = longest**0.5 * torch.finfo(SINGLE).eps
    return sums + (1.5 * torch.finfo(dtype).eps if dtype != SINGLE else 6 * 2**-11 if tf32 else 0)


def assert_like_the_formula(tensors: Tensors, tf32: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """All layers, which are returned."""
    layers, pre = kernels.step_network_layers(*tensors, tf32=tf32), tensors[1]
    for name, found, right in zip(("h1", "h2", "h"), layers, formula(*tensors), strict=True):
        assert found.dtype == pre.dtype and found.is_contiguous(memory_format=LAST)
        assert_close(found, right, allowed(tensors, tf32), name)
    return layers


# In the interpreter of several dtypes the least, which rounds most, and the widest networks take seconds
in_float32_too = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=pytest.mark.exhaustive if dtype == SINGLE and interpreted("triton") else ())
        for dtype in DTYPES
    ],
    ids=str,
)
widest = pytest.mark.exhaustive if interpreted("triton") else ()


@in_float32_too
@pytest.mark.parametrize(
    "channels, hidden, outputs",
    [
        *((6, 64, 12), (12, 64, 24), (24, 64, 48), (6, 32, 12), (0, 64, 24)),
        *(
            pytest.param(*numbers, marks=pytest.mark.slow)
            for numbers in ((48, 64, 96), (0, 32, 192), (17, 70, 130), (0, 130, 3))
        ),
        pytest.param(96, 64, 192, marks=widest),
        *((1, 1, 1), (5, 33, 7)),
    ],
)
def test_channels(dtype, channels, hidden, outputs):
    """Those of models and others: one block of them, several, and blocks filled up with zeros."""
    assert_like_the_formula(network(channels, hidden, outputs, (2, 3), 1, dtype))


@pytest.mark.parametrize("size", [(1, 1), (1, 19), (9, 1), (8, 16), (9, 17), (3, 33)], ids=str)
def test_sizes(size):
    """Parts of a tile, a whole one, and more than one, whose border is in the tile beside it."""
    assert_like_the_formula(network(6, 16, 4, size, 1, HALF))


@pytest.mark.parametrize("channels", [6, 0])
def test_tf32(channels):
    """On a GPU by rounded operands; in the interpreter as without."""
    assert_like_the_formula(network(channels, 32, 12, (2, 3)), tf32=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout, other", zip(IMAGES, (*IMAGES[1:], IMAGES[0])))
def test_layouts(layout, other):
    """z1 and pre are read at their strides, each in a layout of its own, and no memory around them is."""
    z1, pre, *rest = network(3, 8, 2, (3, 4))
    assert_like_the_formula([LAYOUTS[layout](z1), LAYOUTS[other](pre), *rest])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
def test_layouts_of_weights(layout):
    z1, pre, *weights = network(3, 8, 2, (3, 4), batch=1)
    assert_like_the_formula([z1, pre, *map(LAYOUTS[layout], weights)])


@pytest.mark.parametrize("dtype", [torch.float64, HALF, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pre_dtype", DTYPES, ids=str)
def test_dtypes_of_the_state(dtype, pre_dtype):
    """z1 is rounded to the dtype of pre in the kernel, float64 by way of float32."""
    z1, *rest = network(6, 16, 4, (2, 3), 1, pre_dtype)
    assert_like_the_formula([z1.to(dtype), *rest])


@pytest.mark.parametrize("channels", [6, 0])
@pytest.mark.parametrize("layout", ["channels of channels_last", "contiguous"])
def test_samples_may_share_pre(layout, channels):
    """To the bit as if each had its own; two tiles, three samples."""
    z1, pre, *rest = network(channels, 16, 4, (2, 17), 3, HALF)
    shared = LAYOUTS[layout](pre[:1]).expand(3, -1, -1, -1)
    assert shared.stride(0) == 0
    h = assert_like_the_formula([z1, shared, *rest])[2]
    assert torch.equal(h, kernels.step_network_forward(z1, shared.contiguous(memory_format=LAST), *rest))


def test_launches(monkeypatch):
    """Packing, `hidden` and `output`, on the tensors as they lie: a strided state, a shared pre."""
    launched, computed, read = [], [], {}

    def record(kernel, *_, **arguments):
        launched.append(kernel.__name__)
        read.update(arguments)

    for module in (triton_network, _step_network):
        monkeypatch.setattr(module, "launch", record)
    z1, pre, *rest = network(6, 64, 12, batch=3, dtype=HALF)
    shared = pre[:1].expand(3, -1, -1, -1)
    with Watch(lambda name, _: computed.append(name)):
        kernels.step_network_layers(z1, shared, *rest)
    assert launched == ["pack_networks_kernel", "hidden_kernel", "output_kernel"]
    assert set(computed) <= {"aten::empty", "aten::fill_", "aten::select", "aten::unsqueeze"}  # which poison, and views
    assert read["z1"][0] is z1 and read["pre"][0] is shared


def turned(packed: Tensor, paired: bool) -> Tensor:
    """Packed weights (K, tap, in, out) as (K, out, in, tap), the outputs interleaved again where they are paired."""
    weight = packed.movedim(1, 3).movedim(1, 2)
    return torch.stack(weight.chunk(2, dim=1), dim=2).flatten(1, 2) if paired else weight


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels, hidden, outputs", [(6, 32, 12), (0, 20, 7), (17, 16, 130)])
def test_packed_weights(channels, hidden, outputs, layout, monkeypatch):
    """Of several networks by one launch: the numbers themselves in the dtype asked for, zeros around them."""
    launched, launch = [], _step_network.launch
    monkeypatch.setattr(_step_network, "launch", lambda *a, **k: launched.append(a) or launch(*a, **k))
    networks = [network(channels, hidden, outputs)[2:] for _ in range(3)]
    networks = [[None if x is None else (i + 1) * x for x in each] for i, each in enumerate(networks)]
    weights = ([each[i] for each in networks] for i in (0, 1, 3))
    stacks = [None if some[0] is None else torch.stack([LAYOUTS[layout](x) for x in some]) for some in weights]
    packed = kernels.step_network_weights(*stacks, HALF)
    assert len(launched) == 1
    for weight, stack, paired in zip(stacks, packed, (False, False, True), strict=True):
        assert stack.dtype == HALF and stack.is_contiguous() and not any(size % 16 for size in stack.shape[2:])
        if weight is None:
            assert stack.numel() == 0
            continue
        found, (outs, ins) = turned(stack, paired), weight.shape[1:3]
        assert torch.equal(found[:, :outs, :ins], weight.flatten(3).half())
        assert found[:, outs:].abs().sum() == 0 == found[:, :, ins:].abs().sum()


@pytest.mark.parametrize("channels", [6, 0])
def test_packed_weights_give_the_same_bits(channels):
    z1, pre, *weights = network(channels, 16, 4, (3, 4), dtype=HALF)
    stacks = (None if weights[i] is None else torch.stack([torch.zeros_like(weights[i]), weights[i]]) for i in (0, 1, 3))
    packed = [stack[1] for stack in kernels.step_network_weights(*stacks, HALF)]
    broken = [None if x is None else torch.full_like(x, torch.nan) if x.dim() == 4 else x for x in weights]
    expected = kernels.step_network_layers(z1, pre, *weights)
    assert all(map(torch.equal, kernels.step_network_layers(z1, pre, *broken, packed=packed), expected))


@in_float32_too
def test_same_bits_every_time_and_in_every_batch(dtype):
    """Whatever the other samples, and whether the hidden layers are wanted."""
    z1, pre, *rest = network(6, 16, 4, (2, 17), 2, dtype)
    first, again = (kernels.step_network_layers(z1, pre, *rest) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert torch.equal(kernels.step_network_forward(z1, pre, *rest), first[2])
    assert torch.equal(kernels.step_network_forward(z1[1:], pre[1:], *rest), first[2][1:])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.slow
@in_float32_too
@pytest.mark.parametrize("hidden", [pytest.param(16, marks=pytest.mark.exhaustive), 17])
def test_what_is_not_finite_stays_where_it_is(dtype, hidden):
    """A NaN reaches the pixels around it, and infinity becomes NaN only where the formula has one: not by positive weights."""
    signed = network(6, hidden, 4, (8, 9), dtype=dtype)
    positive = [*signed[:2], *(x.abs() for x in signed[2:])]
    for tensors, index, value in (
        *((signed, index, value) for index in (0, 1) for value in (torch.nan, torch.inf)),
        (positive, 0, torch.inf),
    ):
        expected = kernels.step_network_forward(*tensors)
        broken = [x if place != index else x.clone() for place, x in enumerate(tensors)]
        broken[index][0, 2, 4, 5] = value
        found, right = kernels.step_network_forward(*broken), formula(*broken)[2]
        assert torch.equal(found.isnan(), right.isnan())
        assert right.isnan().any() == (tensors is signed)
        touched = ~right.isfinite().all(dim=1, keepdim=True).expand_as(right)
        assert touched[0].any() and torch.equal(found[~touched], expected[~touched])


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("channels", [6, 0])
def test_empty(shape, channels, monkeypatch):
    """Nothing is launched: a GPU refuses a grid of no programs."""
    batch, *size = shape
    launched = []
    for module in (triton_network, _step_network):
        monkeypatch.setattr(module, "launch", lambda *a, **k: launched.append(a))
    h1, h2, h = kernels.step_network_layers(*network(channels, 32, 12, size, batch))
    assert h1.shape == h2.shape == (batch, 32, *size) and h.shape == (batch, 12, *size) and not launched


def far_apart(x: Tensor, dimension: int) -> Tensor:
    """x with 2³⁰ elements from an index of a dimension to the next, in memory of which hardly any is touched."""
    strides = [2**30 if each == dimension else stride for each, stride in enumerate(x.contiguous().stride())]
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, strides)) + 1
    storage = torch.UntypedStorage(reach * x.element_size(), device=x.device)
    return torch.tensor([], dtype=x.dtype, device=x.device).set_(storage, 0, x.shape, strides).copy_(x)


# z1 and pre are addressed by one function, w1 by another whose four products are of one line
ONE_OF_EACH = {(0, 0), (1, 1), (0, 2), (1, 3), (2, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
@pytest.mark.parametrize("index", [0, 1, 2], ids=["z1", "pre", "w1"])
@marked("exhaustive", lambda index, dimension: (index, dimension) not in ONE_OF_EACH)
def test_offsets_beyond_32_bits(index, dimension):
    """Three samples, outputs, channels, rows or columns 2³⁰ elements apart."""
    tensors = network(3, 3, 2, (3, 3), 3, HALF)
    tensors[0] = tensors[0].half()
    expected = kernels.step_network_forward(*tensors)
    tensors[index] = far_apart(tensors[index], dimension)
    assert torch.equal(kernels.step_network_forward(*tensors), expected)


def test_outputs_beyond_32_bits(monkeypatch):
    """The samples of the hidden layers and of the output are 2³⁰ elements apart."""
    tensors = network(3, 3, 2, (2, 3), 3, HALF)
    expected = kernels.step_network_layers(*tensors)
    allocate = triton_network._empty
    monkeypatch.setattr(triton_network, "_empty", lambda *a: far_apart(allocate(*a), 0))
    found = kernels.step_network_layers(*tensors)
    assert all(x.stride(0) == 2**30 for x in found) and all(map(torch.equal, found, expected))


def test_float64_is_refused():
    tensors = [None if x is None else x.double() for x in network(6, 16, 4)]
    with pytest.raises(TypeError, match="pre must be float32, float16 or bfloat16"):
        kernels.step_network_forward(*tensors)


def parted(tensors: Tensors) -> Tensors:
    """Leaves that ask for gradients."""
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("channels", [6, 0])
def test_gradients_of_the_operator(channels):
    """Of every tensor, from the layers that the kernels recompute: beside autograd of the formula in float64.

    A sum over all pixels and the rounding of three layers: 20 times what a value has (tests/ops/test_network_operators.py).
    """
    tensors = network(channels, 16, 4, (3, 4))
    leaves, exact = parted(tensors), parted([None if x is None else x.double() for x in tensors])
    h, expected = ops.step_network(*leaves, backend="triton"), formula(*exact)[2]
    weights = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    given = [[x for x in some if x is not None] for some in (leaves, exact)]
    found = torch.autograd.grad(h, given[0], weights)
    for grad, right in zip(found, torch.autograd.grad(expected, given[1], weights.double()), strict=True):
        assert_close(grad, right, 20 * 3 * ROUNDING[SINGLE], f"gradient of shape {tuple(grad.shape)}")


def test_the_operator_shares_pre_and_has_registered_twins():
    """A batch of 1 is shared by `evaluate_network`; what fake tensors say of memory is what the kernels return."""
    z1, pre, *rest = network(6, 16, 4, (3, 4))
    shared = evaluate_network(StepNetwork(*rest), z1, pre[:1], False, "triton")
    assert torch.equal(shared, ops.step_network(z1, pre[:1].expand(2, -1, -1, -1), *rest, backend="triton"))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    call = (*parted([z1, pre, *rest]), False, "triton")
    torch.library.opcheck(torch.ops.ncsr_fast.step_network.default, call, test_utils=utilities)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [pytest.param(True, marks=pytest.mark.exhaustive), False])
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_the_engine_walks_by_it(everything, checkpoint, monkeypatch):
    """Likelihoods, gradients and decoded images are those of the reference, noise networks included: with the networks of the
    steps alone by this backend, or all that the engine does by its name.

    Values are as far off as float32 is, amplified by scales of about 1; of float32 gradients of flows 1e-2 is right, for ReLUs
    near zero (docs/architecture.md). Gradients of one network are compared more closely above.
    """
    called, triton = set(), functions_of("triton")
    names = {"step_network_tails", "step_network_backward", "step_network_weights_backward"}
    names |= {
        "step_network_coupled" if everything else "step_network_forward",
        *([] if checkpoint else ["step_network_layers"]),
    }
    for name in names:
        function = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *a, f=function, **k: called.add(f.__name__) or f(*a, **k))
    lr, hr = image(1, 3, 2, 2, dtype=SINGLE).to(DEVICE), image(1, 3, 8, 8, dtype=SINGLE).to(DEVICE)
    found = []
    for backend in ("reference", "triton"):
        model = tiny_model(dtype=SINGLE).to(DEVICE)
        if not everything:
            monkeypatch.setattr(plan, "covering_backend", lambda *_, backend=backend: backend)
        model.options = type(model.options)(backend=backend if everything else "reference", checkpoint=checkpoint)
        nll = model.nll(hr, lr)
        nll.sum().backward()
        with torch.no_grad():
            latents = [torch.full_like(latent, 0.5) for latent in model.encode(hr, lr).latents]
            decoded = model.decode(latents, lr)
        found += [nll.detach(), decoded, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}]
        assert called == (names if backend == "triton" else set())
    right, expected, others, nll, decoded, grads = found
    assert_close(nll, right, 20 * ROUNDING[SINGLE], "nll")
    assert_close(decoded, expected, 20 * ROUNDING[SINGLE], "decoded")
    assert grads.keys() == others.keys() and len(grads) > 50
    for name, grad in grads.items():
        assert relative_error(grad, others[name]) < 1e-2, name
