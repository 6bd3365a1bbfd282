"""The gradients of the steps' networks, and of the weights they are folded from, in Triton: beside float64, in the interpreter
or on a GPU."""

from __future__ import annotations

import sys

import installation
import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS
from operator_cases import assert_close, interpreted
from torch import Tensor

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

from ncsr_fast import kernels  # noqa: E402
from ncsr_fast.kernels import _flow_step_mix, _network_weight, fold_filters  # noqa: E402
from ncsr_fast.ops import reference  # noqa: E402
from ncsr_fast.ops.network_gradients import NetworkPass, StepNetwork  # noqa: E402

pytestmark = pytest.mark.slow  # in `make check` the tests of the operators run these kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
SINGLE, HALF = torch.float32, torch.float16
# Triton's interpreter multiplies bfloat16 wrongly: float16 stands for both
DTYPES = [SINGLE, HALF] if interpreted("triton") else [SINGLE, HALF, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel should write starts as NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocate(*a, **k).fill_(float("nan")))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """In the interpreter three parts of a sum, which are as good as 48 to go wrong and take seconds less."""
    if interpreted("triton"):
        monkeypatch.setattr(_network_weight, "PARTS", {1: 3, 9: 3})


class Case:
    """A network, what it reads, and the gradient of its output, in the engine's layout, as `step_network_backward` takes them.

    z1 is the first half of a float32 state, pre some of the pre-activations of several networks. The gradient of the state
    and room for that of pre lie likewise, among NaN.
    """

    def __init__(self, channels: int, hidden: int, outputs: int, size=(5, 7), batch: int = 2, dtype=SINGLE, seed: int = 0):
        generator = torch.Generator().manual_seed(seed + channels + 100 * hidden + outputs)

        def normal(*shape: int, variance: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator).mul(variance**0.5).to(DEVICE)
            return drawn.to(memory_format=LAST) if len(shape) == 4 and shape[-1] == size[1] else drawn

        def among_nan(c: int, count: int, dtype: torch.dtype) -> Tensor:
            return torch.full((batch, count * c, *size), torch.nan, device=DEVICE, dtype=dtype).to(memory_format=LAST)

        self.z1 = normal(batch, 2 * channels, *size)[:, :channels] if channels else None
        self.pre = normal(batch, 3 * hidden, *size).to(dtype)[:, hidden : 2 * hidden]
        w1 = normal(hidden, channels, 3, 3, variance=1 / (9 * channels)) if channels else None
        w2, b2 = normal(hidden, hidden, 1, 1, variance=1 / hidden), normal(hidden)
        w3, b3 = normal(outputs, hidden, 3, 3, variance=1 / (9 * hidden)), normal(outputs)
        self.network = StepNetwork._make(None if x is None else x.to(dtype) for x in (w1, w2, b2, w3, b3))
        self.dh = normal(batch, outputs, *size).to(dtype)
        self.sources, self.dstate = among_nan(hidden, 3, dtype), among_nan(channels or 1, 2, SINGLE)
        self.dpre = self.sources[:, hidden : 2 * hidden]
        self.dz1 = None if self.z1 is None else self.dstate[:, :channels].fill_(0.5)

    def passed(self, layers: tuple) -> NetworkPass:
        h1, h2, dh2, sums = layers
        return NetworkPass(self.z1, self.pre, h1, h2, self.dpre, dh2, self.dh, sums)

    def gradients(self) -> StepNetwork:
        """Room for those of the weights, in a dtype that sums are not rounded to."""
        return StepNetwork._make(None if x is None else torch.empty(x.shape, device=DEVICE) for x in self.network)


def run(cases: list[Case], hidden: list | None = None, tf32: bool = False) -> list[list[Tensor | None]]:
    """h1, h2, dpre, dh2, dz1 and the gradients of the weights, of every case, all in one call each."""
    dh, z1, pre, networks, dpre, dz1 = zip(*((c.dh, c.z1, c.pre, c.network, c.dpre, c.dz1) for c in cases))
    layers = kernels.step_network_backward(dh, z1, pre, hidden, networks, dpre, dz1, tf32=tf32)
    passes, gradients = [c.passed(found) for c, found in zip(cases, layers)], [c.gradients() for c in cases]
    kernels.step_network_weights_backward(passes, gradients, tf32=tf32)
    return [
        [own.h1, own.h2, c.dpre.clone(), own.dh2, None if c.dz1 is None else c.dz1.clone(), *found]
        for c, own, found in zip(cases, layers, gradients)
    ]


def transposed(dy: Tensor, weight: Tensor) -> Tensor:
    """weightᵀ ∗ dy in float64."""
    return F.conv_transpose2d(dy.double(), weight.double(), padding=weight.shape[-1] // 2)


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """From the definition, in float64: a sum over pixels for every tap."""
    side, (height, width) = weight.shape[-1], dy.shape[2:]
    x = F.pad(x.double(), [side // 2] * 4)
    taps = [
        torch.einsum("bnhw,bchw->nc", dy.double(), x[:, :, row : row + height, column : column + width])
        for row in range(side)
        for column in range(side)
    ]
    return torch.stack(taps, dim=2).view(weight.shape)


def assert_gradients(case: Case, found: list[Tensor | None], tf32: bool = False) -> None:
    """Each result beside float64 from the kernels' own results that it is made of, so that a ReLU is open in both or in none.

    Of n additions in float32 each rounds a partial sum, no larger than the largest result, by half an eps at most, up or down
    as it comes: ½√n eps; twice that. Results are rounded once, to half an eps of their dtype, and TF32 rounds both operands of
    a product by 2⁻¹¹. h1 and dh2 that are not in memory are the forward pass's, and float64's rounded as the kernel rounds it:
    one that is rounded the other way is a term off by an eps of its dtype, and no larger than the largest result.
    """
    h1, h2, dpre, dh2, dz1, dw1, dw2, db2, dw3, db3 = found
    z1, inside = None if case.z1 is None else case.z1.to(h2.dtype), dh2 is None
    if h1 is None:
        h1 = F.relu(case.pre) if z1 is None else kernels.step_network_layers(z1, case.pre, *case.network, tf32=tf32)[0]
    network, pixels = case.network, h2[:, 0].numel()

    def assert_sum(value: Tensor, right: Tensor, length: int, name: str, further: float = 0.0) -> None:
        rounded = torch.finfo(value.dtype).eps / 2 + (2**-10 if tf32 else 0)
        assert_close(value, right, length**0.5 * torch.finfo(SINGLE).eps + rounded + further, name)

    inputs, hidden, outputs = (0 if z1 is None else z1.shape[1]), h2.shape[1], case.dh.shape[1]
    pre = case.pre.double() if z1 is None else case.pre.double() + F.conv2d(z1.double(), network.w1.double(), padding=1)
    assert_sum(h1, F.relu(pre), 9 * inputs + 1, "h1")
    assert_sum(h2, F.relu(F.conv2d(h1.double(), network.w2.double(), network.b2.double())), hidden + 1, "h2")
    exact = transposed(case.dh, network.w3) * (h2 > 0)
    if dh2 is None:
        dh2 = exact.to(h2.dtype)
    else:
        assert_sum(dh2, exact, 9 * outputs, "dh2")
    # sums of sums, where it is not in memory
    before, rounded = (9 * outputs, torch.finfo(h2.dtype).eps + (2**-10 if tf32 else 0)) if inside else (0, 0.0)
    assert_sum(dpre, transposed(dh2, network.w2) * (h1 > 0), hidden + before, "dpre", rounded)
    assert_sum(dw3, weight_gradient(case.dh, h2, network.w3), pixels, "dw3")
    assert_sum(db3, case.dh.double().sum(dim=(0, 2, 3)), pixels, "db3")
    assert_sum(dw2, weight_gradient(dh2, h1, network.w2), pixels + before, "dw2", rounded)
    assert_sum(db2, dh2.double().sum(dim=(0, 2, 3)), pixels + before, "db2", rounded)
    if z1 is not None:
        assert_sum(dz1, 0.5 + transposed(dpre, network.w1), 9 * hidden + 1, "dz1")
        assert_sum(dw1, weight_gradient(dpre, z1, network.w1), pixels, "dw1")
        assert case.dstate[:, z1.shape[1] :].isnan().all()
    assert case.sources[:, :hidden].isnan().all() and case.sources[:, 2 * hidden :].isnan().all()


# in the interpreter the dtype that rounds most
in_float32_too = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=pytest.mark.exhaustive if dtype == SINGLE and interpreted("triton") else ())
        for dtype in DTYPES
    ],
    ids=str,
)


@in_float32_too
@pytest.mark.parametrize(
    "channels, hidden, outputs",
    [
        *((6, 64, 12), (0, 32, 24), (1, 1, 1), (5, 33, 7), (33, 4, 2)),
        # several blocks of channels, and hidden layers too wide for one kernel
        *(pytest.param(*numbers, marks=pytest.mark.exhaustive) for numbers in ((48, 64, 96), (17, 70, 130), (0, 130, 3))),
        pytest.param(3, 130, 4, marks=pytest.mark.exhaustive),
    ],
)
def test_channels(dtype, channels, hidden, outputs):
    case = Case(channels, hidden, outputs, (2, 3), 2, dtype)
    assert_gradients(case, *run([case]))


@pytest.mark.parametrize("size", [(1, 1), (1, 19), (9, 1), (9, 17), (3, 33)], ids=str)
def test_sizes(size):
    """Parts of a tile, and more than one, whose border is in the tile beside it; parts of a sum that have no tile."""
    case = Case(6, 16, 4, size, 1, SINGLE)
    assert_gradients(case, *run([case]))


@pytest.mark.exhaustive
def test_sums_of_many_tiles():
    """More tiles than there are parts of a sum."""
    case = Case(2, 4, 2, (9, 17), 2, SINGLE)
    assert_gradients(case, *run([case]))


@pytest.mark.parametrize("channels", [6, 0])
def test_tf32(channels):
    """On a GPU by rounded operands; in the interpreter as without."""
    case = Case(channels, 32, 12, (2, 3))
    assert_gradients(case, *run([case], tf32=True), tf32=True)


@pytest.mark.parametrize("channels", [3, 0])
def test_several_networks_are_each_as_alone(channels):
    """To the bit, whichever share a launch, and every time; of images that lie differently too."""
    first, cases = ([Case(channels, 4, 2, (1, 17), 1, SINGLE, seed) for seed in range(2)] for _ in range(2))
    alone = [run([case])[0] for case in first]
    cases[1].dh = LAYOUTS["contiguous"](cases[1].dh)
    for found, right in zip(run(cases), alone, strict=True):
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(found, right, strict=True))


@pytest.mark.parametrize("channels", [3, 0])
def test_layers_that_are_given_are_as_good(channels):
    """The same bits as with those that are recomputed, which are those of the forward pass."""
    one, two = (Case(channels, 4, 2, (1, 17), 1, SINGLE) for _ in range(2))
    (found,) = run([one])
    h1, h2, _ = kernels.step_network_layers(two.z1, two.pre, *two.network)
    assert torch.equal(found[1], h2) and found[0] is None
    (given,) = run([two], [(h1 if channels else None, h2)])
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(found[1:], given[1:], strict=True))


@pytest.mark.parametrize("channels", [3, 0])
def test_hidden_layers_that_are_too_wide_for_one_kernel(channels, monkeypatch):
    """h1 and dh2 are then in memory, and none is left out of the sums: an odd number of channels, more than one tile."""
    monkeypatch.setattr(sys.modules[kernels.step_network_backward.__module__], "FUSED", 8)
    case = Case(channels, 5, 2, (2, 17), 2, SINGLE)
    (found,) = run([case])
    assert (found[0] is None) == (channels == 0) and found[3] is not None
    assert_gradients(case, found)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_layouts(layout):
    """What is read may lie anyhow."""
    case = Case(3, 8, 2, (3, 4))
    case.z1, case.pre, case.dh = map(LAYOUTS[layout], (case.z1, case.pre, case.dh))
    assert_gradients(case, *run([case]))


def test_what_is_written_must_lie_alike():
    one, two = Case(3, 8, 2, (3, 4)), Case(3, 8, 2, (3, 4), seed=1)
    two.dpre = torch.empty(two.dpre.shape, device=DEVICE)
    with pytest.raises(ValueError, match="dpre: the tensors written must all have the same strides"):
        run([one, two])


def test_a_derivative_by_differences():
    """Of Σ dh · h along a direction of all tensors at once, in float32.

    Every ReLU is far from its kink, a third of them shut, so that the network is a polynomial of degree 3 in the step, whose
    error of a central difference is step² times its third derivative: the product of three changes, about as large as h. Sums
    of float32 err by an eps of the sum of magnitudes, and the quotient by that over the step.
    """
    case, step = Case(3, 8, 4, (4, 5), 2, SINGLE), 2**-6
    signs = torch.where(torch.arange(8, device=DEVICE) % 3 == 0, -1.0, 1.0)
    case.pre = (6 * signs[:, None, None] + 0.1 * case.pre).contiguous(memory_format=LAST)
    case.network = case.network._replace(b2=20 * signs)
    tensors = [case.z1, case.pre, *case.network]
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(x.shape, generator=generator).to(DEVICE) * 0.3 for x in tensors]

    def value(t: float) -> Tensor:
        h = kernels.step_network_forward(*(x + t * d for x, d in zip(tensors, directions)))
        return (h.double() * case.dh.double()).sum()

    (found,) = run([case])
    _, _, dpre, _, dz1, *gradients = found
    slope = sum((x.double() * d.double()).sum() for x, d in zip((dz1 - 0.5, dpre, *gradients), directions))
    magnitude = (case.dh.abs().double() * kernels.step_network_forward(*tensors).abs().double()).sum()
    allowed = magnitude * (step**2 + torch.finfo(SINGLE).eps / step)
    assert slope.abs() > 100 * allowed, "the derivative is not small"
    assert ((value(step) - value(-step)) / (2 * step) - slope).abs() < allowed


def test_launches(monkeypatch):
    """Of networks that read the state two, and the packing of weights that were not packed; of others one for all."""
    launched = []
    for module in (sys.modules[kernels.step_network_backward.__module__], _network_weight):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    run([Case(3, 8, 2, (3, 4))])
    sums = ["network_weight_kernel", "sum_network_partials_kernel"]
    assert launched == ["hidden_backward_kernel", "state_backward_kernel", *sums, sums[1], *sums]
    launched.clear()
    run([Case(0, 8, 2, (3, 4), seed=seed) for seed in range(3)])
    assert launched == ["hidden_backward_kernel", *sums, sums[1]]


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("channels", [6, 0])
def test_empty(shape, channels):
    """Gradients of weights are zero, and nothing is launched over no programs."""
    batch, *size = shape
    case = Case(channels, 8, 4, tuple(size), batch)
    found = run([case])[0]
    assert all(x is None or not x.any() for x in found[5:])


def test_float64_is_refused():
    case = Case(3, 8, 2, (3, 4))
    case.pre = case.pre.double()
    with pytest.raises(TypeError, match="pre must be float32, float16 or bfloat16"):
        run([case])


# ---- matrices of flow steps


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_mixes_of_several_steps_are_each_as_alone(inverse):
    """To the bit; with and without affines, which the first and the last step of a level lack; images that lie differently.

    Those of the reference are as in its own backward pass but for the order of sums (½√n eps each, up or down as it comes),
    and both backends leave them out where that is asked for.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(channels: int) -> Tensor:
        return torch.randn(2, channels, 3, 19, generator=generator).to(DEVICE).to(memory_format=LAST)

    def step(before: bool, after: bool) -> list[Tensor | None]:
        widths = (12, 6) if inverse else (6, 12)
        return [normal(6), normal(6), *(normal(width) if there else None for width, there in zip(widths, (before, after)))]

    steps = [step(False, True), step(True, True), step(True, True), step(True, False)]
    steps[1][0] = LAYOUTS["contiguous"](steps[1][0])
    mix, g = torch.eye(6, device=DEVICE), torch.zeros(2, device=DEVICE)
    for functions in (kernels, reference):
        dmix, doffset = functions.flow_step_mix_backward(steps, 1e-4, inverse)
        assert dmix.shape == (4, 6, 6) and doffset.shape == (4, 6)
        for (dy, x, before, after), *found in zip(steps, dmix, doffset, strict=True):
            y = functions.flow_step_forward(x, mix, mix[0], before, after, 1e-4, inverse)[0]
            call = dy, g, x, y, mix, before, after, 1e-4, inverse
            for value, right in zip(found, functions.flow_step_backward(*call)[1:3], strict=True):
                assert functions is reference or torch.equal(value, right)
                assert_close(value, right, x[:, 0].numel() ** 0.5 * torch.finfo(SINGLE).eps, "of mix or offset")
            assert functions.flow_step_backward(*call, mix_later=True)[1:3] == (None, None)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_mixes_of_several_blocks_and_tiles(inverse, monkeypatch):
    """More channels than a block has, and three tiles of a program; and of no pixels."""
    monkeypatch.setattr(_flow_step_mix, "PROGRAMS", 1)
    generator = torch.Generator().manual_seed(0)
    widths = (34, 34, *((68, 34) if inverse else (34, 68)))
    step = [torch.randn(1, width, 1, 40, generator=generator).to(DEVICE).to(memory_format=LAST) for width in widths]
    found = kernels.flow_step_mix_backward([step], 1e-4, inverse)
    exact = reference.flow_step_mix_backward([[x.double() for x in step]], 1e-4, inverse)
    for value, right in zip(found, exact, strict=True):
        # as above, and a few roundings of the two affine maps' scales and values, each half an eps
        assert_close(value, right, (40**0.5 + 8) * torch.finfo(SINGLE).eps, "of mix or offset")
    for none in kernels.flow_step_mix_backward([[x[..., :0] for x in step]], 1e-4, inverse):
        assert not none.any()


# ---- scales folded into weights


def filters(dtype: torch.dtype = SINGLE) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float], list[int]]:
    """Weights, biases and logs of stacks, factors, and first inputs: some, all and none of them, rows of several blocks."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 8, 5, 3, 3), (2, 8, 8, 1, 1), (2, 6, 8, 3, 3), (3, 4, 130, 3, 3)
    weights = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    biases, logs = ([torch.randn(shape[:2], generator=generator).to(DEVICE, dtype) for shape in shapes] for _ in range(2))
    return weights, biases, [0.3 * x for x in logs], [1.0, 1.0, 3.0, 1.0], [2, 8, 8, 0]


def flat(parts) -> list[Tensor]:
    return [tensor for some in parts for tensor in some]


def folded(weights, biases, logs, factors, first) -> list[Tensor]:
    """From the definition."""
    scales = [torch.exp(factor * own) for factor, own in zip(factors, logs)]
    scaled = [weight * scale[..., None, None, None] for weight, scale in zip(weights, scales)]
    heads, tails = zip(*((x[:, :, :count], x[:, :, count:]) for x, count in zip(scaled, first)))
    return [*heads, *tails, *(bias * scale for bias, scale in zip(biases, scales))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_folded_filters(dtype, layout, monkeypatch):
    """One launch; an exponential, a product and a rounding: 4 eps of float32 and half an eps of the dtype."""
    launched = []
    launch = fold_filters.launch
    monkeypatch.setattr(fold_filters, "launch", lambda kernel, *a, **k: launched.append(kernel) or launch(kernel, *a, **k))
    weights, biases, logs, *rest = filters()
    given = [LAYOUTS[layout](x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in weights]
    found = flat(kernels.fold_filters_forward(given, biases, logs, *rest, dtype))
    assert len(launched) == 1
    exact = folded(*([x.double() for x in some] for some in (weights, biases, logs)), *rest)
    for value, right in zip(found, exact, strict=True):
        assert value.dtype == dtype and value.is_contiguous()
        assert_close(value, right, 4 * torch.finfo(SINGLE).eps + torch.finfo(dtype).eps / 2, "folded")


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("functions", [kernels, reference], ids=["triton", "reference"])
def test_gradients_of_folded_filters(functions, layout):
    """Beside autograd of the definition in float64; the longest sum is of 1,170 products, and the sign of each is random."""
    weights, biases, logs, factors, first = filters()
    exact = [[x.double().requires_grad_() for x in some] for some in (weights, biases, logs)]
    outputs = folded(*exact, factors, first)
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(x.shape, generator=generator).to(DEVICE) for x in outputs]
    gradients = [LAYOUTS[layout](x.flatten(0, 1)).unflatten(0, x.shape[:2]) if x.dim() == 5 else x for x in gradients]
    given = [(x, g.double()) for x, g in zip(outputs, gradients) if x.numel()]
    expected = torch.autograd.grad([x for x, _ in given], flat(exact), [g for _, g in given])
    found = functions.fold_filters_backward(gradients[:4], gradients[4:8], gradients[8:], weights, biases, logs, factors)
    for value, right in zip(flat(found), expected, strict=True):
        assert value.dtype == SINGLE and value.shape == right.shape
        assert_close(value, right, (1170**0.5 + 4) * torch.finfo(SINGLE).eps, "gradient")
