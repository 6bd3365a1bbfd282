"""The Triton host functions against a float64 oracle and its autograd; on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import math

import installation
import pytest
import torch
from operator_cases import interpreted
from support import Watch
from torch import Tensor

pytestmark = pytest.mark.slow  # in `make check` the tests of the operators run these kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

from ncsr_fast import kernels  # noqa: E402
from ncsr_fast.kernels import _common, _elementwise, _flow_step_mix, flow_step  # noqa: E402

EPS = 1e-4
SIZE = (2, 7, 5)  # batch, height, width: 35 pixels are no multiple of any tile
# Largest error to largest value: a few roundings of the stored result, a sum of up to 70 products in float32
ROUNDING = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

in_the_interpreter_exhaustive = pytest.mark.exhaustive if interpreted("triton") else pytest.mark.slow  # tests/ops has the same
inverses = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
layouts = pytest.mark.parametrize("layout", ["nchw", "nhwc", "view", "nhwc-view"])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel should write starts as NaN."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, allocate=allocate, **k: allocate(*a, **k).fill_(float("nan")))


@pytest.fixture
def normal():
    """Normal numbers (batch, channels, height, width) in a layout: a view is cut out in channels and in space."""
    generator = torch.Generator().manual_seed(0)

    def draw(channels: int, layout: str = "nchw", dtype: torch.dtype = torch.float32, size=SIZE) -> Tensor:
        batch, height, width = size
        wide = torch.randn(batch, channels + 3, height + 2, width + 1, generator=generator).to(DEVICE, dtype)
        wide = wide.to(memory_format=torch.channels_last) if "nhwc" in layout else wide
        view = wide[:, 1 : channels + 1, 1 : height + 1, :width]
        memory_format = torch.channels_last if "nhwc" in layout else torch.contiguous_format
        return view if "view" in layout else view.contiguous(memory_format=memory_format)

    return draw


def affine(x: Tensor, h: Tensor, pass_through: int, inverse: bool) -> tuple[Tensor, Tensor]:
    shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2) + EPS
    changed = x[:, pass_through:] / scale - shift if inverse else (x[:, pass_through:] + shift) * scale
    logdet = scale.log().sum(dim=(1, 2, 3))
    return torch.cat([x[:, :pass_through], changed], dim=1), -logdet if inverse else logdet


def gaussian(x: Tensor, h: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    mean, logs = h[:, 0::2], h[:, 1::2]
    pass_through = x.shape[1] - mean.shape[1]
    z2 = mean + logs.exp() * x[:, pass_through:] if inverse else x[:, pass_through:]
    eps = x[:, pass_through:] if inverse else (z2 - mean) / logs.exp()
    density = (-0.5 * (eps**2 + math.log(2 * math.pi)) - logs).sum(dim=(1, 2, 3))
    return torch.cat([x[:, :pass_through], z2 if inverse else eps], dim=1), -density if inverse else density


def step(x: Tensor, mix: Tensor, offset: Tensor, h_before, h_after, inverse: bool) -> tuple[Tensor, Tensor]:
    half, nothing = x.shape[1] // 2, x.sum(dim=(1, 2, 3)) * 0
    a, before = (x, nothing) if h_before is None else affine(x, h_before, 0 if inverse else half, inverse)
    w = torch.einsum("oc,bchw->bohw", mix, a) + offset[:, None, None]
    y, after = (w, nothing) if h_after is None else affine(w, h_after, half if inverse else 0, inverse)
    return y, before + after


def assert_close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and actual.shape == expected.shape, name
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error < ROUNDING[dtype], f"{name}: error {error:.1e}"  # also false for NaN


def check(oracle, forward, backward, inputs: dict[str, Tensor | None], dy: Tensor, dlogdet: Tensor) -> None:
    """y, logdet and the gradient of every input that is there."""
    exact = {name: None if t is None else t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected_y, expected_logdet = oracle(*exact.values())
    present = [name for name, t in inputs.items() if t is not None]
    expected = torch.autograd.grad(
        [expected_y, expected_logdet], [exact[name] for name in present], [dy.double(), dlogdet.double()]
    )
    y, logdet = forward(*inputs.values())
    gradients = dict(zip(inputs, backward(dy, dlogdet, y, *inputs.values()), strict=True))
    assert_close("y", y, expected_y, dy.dtype)
    assert_close("logdet", logdet, expected_logdet, torch.float32)
    for name, gradient in zip(present, expected, strict=True):
        assert_close(f"d{name}", gradients[name], gradient, inputs[name].dtype)
    assert all(gradients[name] is None for name in inputs if name not in present)


def check_affine(x: Tensor, h: Tensor, pass_through: int, inverse: bool, dy: Tensor, dlogdet: Tensor) -> None:
    check(
        lambda x, h: affine(x, h, pass_through, inverse),
        lambda x, h: kernels.affine_forward(x, h, pass_through, EPS, inverse),
        lambda dy, g, y, x, h: kernels.affine_backward(dy, g, x, h, pass_through, EPS, inverse),
        {"x": x, "h": h},
        dy,
        dlogdet,
    )


def check_step(inputs: dict[str, Tensor | None], inverse: bool, dy: Tensor, dlogdet: Tensor) -> None:
    check(
        lambda *t: step(*t, inverse),
        lambda *t: kernels.flow_step_forward(*t, EPS, inverse),
        lambda dy, g, y, x, mix, _, *h: kernels.flow_step_backward(dy, g, x, y, mix, *h, EPS, inverse),
        inputs,
        dy,
        dlogdet,
    )


def step_inputs(
    normal, channels: int, inverse: bool, layout: str = "nchw", dtype=torch.float32, size=SIZE
) -> dict[str, Tensor]:
    half = channels // 2
    pass_through = (0, half) if inverse else (half, 0)
    square = normal(channels, size=(1, channels, 1))[0, :, :, 0] / math.sqrt(channels)
    h_before, h_after = (normal(2 * (channels - k), layout, dtype, size) for k in pass_through)
    return {
        "x": normal(channels, layout, size=size),
        "mix": square,
        "offset": square[0] + 1,
        "h_before": h_before,
        "h_after": h_after,
    }


DLOGDET = torch.tensor([0.7, -1.3], device=DEVICE)


@in_the_interpreter_exhaustive
@inverses
@layouts
@pytest.mark.parametrize("pass_through", [0, 2])
def test_affine(normal, layout, pass_through, inverse):
    check_affine(normal(5, layout), normal(2 * (5 - pass_through), layout), pass_through, inverse, normal(5, layout), DLOGDET)


@in_the_interpreter_exhaustive
@inverses
@layouts
def test_gaussian_split(normal, layout, inverse):
    check(
        lambda x, h: gaussian(x, h, inverse),
        lambda x, h: kernels.gaussian_split_forward(x, h, inverse),
        lambda dy, g, y, x, h: kernels.gaussian_split_backward(dy, g, x, h, inverse),
        {"x": normal(5, layout), "h": normal(6, layout)},
        normal(5, layout),
        DLOGDET,
    )


@in_the_interpreter_exhaustive
@inverses
@layouts
def test_step(normal, layout, inverse):
    check_step(step_inputs(normal, 12, inverse, layout), inverse, normal(12, layout), DLOGDET)


@in_the_interpreter_exhaustive
@inverses
@pytest.mark.parametrize("channels", [1, 70], ids=["one-channel", "two-tiles-of-channels"])
def test_step_channels(normal, channels, inverse):
    check_step(step_inputs(normal, channels, inverse, "nhwc"), inverse, normal(channels, "nhwc"), DLOGDET)


@in_the_interpreter_exhaustive
@inverses
@pytest.mark.parametrize("missing", [("h_before",), ("h_after",), ("h_before", "h_after")], ids="-".join)
def test_step_without_an_affine(normal, missing, inverse):
    inputs = {**step_inputs(normal, 5, inverse), **dict.fromkeys(missing)}
    check_step(inputs, inverse, normal(5), DLOGDET)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_weight_gradient_over_parts_of_several_tiles(normal, layout, monkeypatch):
    """77 pixels are 3 tiles: 1 part of 3; 2 parts of 2, of which the last is outside; or 3 parts of 1."""
    for programs in (1, 4, 6):
        monkeypatch.setattr(_flow_step_mix, "PROGRAMS", programs)
        size = (2, 7, 11)
        check_step(step_inputs(normal, 5, False, layout, size=size), False, normal(5, layout, size=size), DLOGDET)


@inverses
def test_expanded_and_transposed_inputs(normal, inverse):
    """A dy of stride 0, as sum() makes it, one dlogdet for the batch, and a mix read by its strides."""
    dy, dlogdet = normal(5, size=(1, 1, 1)).expand(2, 5, 7, 5), DLOGDET[:1].expand(2)
    inputs = step_inputs(normal, 5, inverse)
    check_step({**inputs, "mix": inputs["mix"].T, "offset": inputs["mix"][:, 1]}, inverse, dy, dlogdet)
    check_affine(normal(5), normal(10), 0, inverse, dy, dlogdet)


@inverses
@pytest.mark.parametrize("layout, other", [("nchw", "nhwc"), ("nhwc", "nchw")])
def test_mixed_layouts(normal, layout, other, inverse):
    check_step({**step_inputs(normal, 5, inverse, other), "x": normal(5, layout)}, inverse, normal(5, other), DLOGDET)
    check_affine(normal(5, layout), normal(6, other), 2, inverse, normal(5, other), DLOGDET)


@in_the_interpreter_exhaustive
@inverses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(normal, dtype, inverse):
    """bfloat16 h with a state of every dtype; y, dx and dh come back in the dtype of theirs."""
    inputs = step_inputs(normal, 5, inverse, dtype=torch.bfloat16)
    check_step({**inputs, "x": inputs["x"].to(dtype)}, inverse, normal(5, dtype=dtype), DLOGDET)
    check_affine(normal(5, dtype=dtype), normal(6, dtype=torch.bfloat16), 2, inverse, normal(5, dtype=dtype), DLOGDET)


@inverses
def test_saturated_scales(inverse):
    """Huge states and scales between eps and 1 + eps: nothing overflows, and the log of eps is exact."""
    raw = torch.tensor([-1e4, -100.0, -30.0, 30.0, 100.0, 1e4], device=DEVICE).view(1, 6, 1, 1)
    h = torch.stack([torch.zeros_like(raw), raw], dim=2).flatten(1, 2)
    x = torch.full_like(raw, 1e6)
    y, logdet = kernels.affine_forward(x, h, 0, EPS, inverse)
    dx, dh = kernels.affine_backward(x, DLOGDET[:1], x, h, 0, EPS, inverse)
    assert all(t.isfinite().all() for t in (y, logdet, dx, dh))
    assert logdet.item() == pytest.approx((-1 if inverse else 1) * 3 * (math.log(EPS) + math.log1p(EPS)), rel=1e-6)


def test_nan_stays_in_its_sample(normal):
    inputs = step_inputs(normal, 5, False)
    inputs["x"][1, 2, 3, 4] = float("nan")
    y, logdet = kernels.flow_step_forward(*inputs.values(), EPS, False)
    assert y[0].isfinite().all() and logdet[0].isfinite() and logdet[1].isfinite()
    assert y[1].isnan().sum() == 5 and y[1, :, 3, 4].isnan().all()


def test_repeats_are_equal_to_the_bit(normal):
    inputs = step_inputs(normal, 12, False)
    calls = [kernels.flow_step_forward(*inputs.values(), EPS, False) for _ in range(2)]
    y, (x, mix, _, *h) = calls[0][0], inputs.values()
    calls = [(*call, *kernels.flow_step_backward(y, DLOGDET, x, y, mix, *h, EPS, False)) for call in calls]
    assert all(torch.equal(first, second) for first, second in zip(*calls, strict=True))


@pytest.mark.parametrize("dim, shape", [(0, (700, 13)), (1, (3, 5000))], ids=["adjacent-outputs", "adjacent-parts"])
def test_second_stage_of_a_reduction(dim, shape):
    """In float64: of integers that cancel the sums are exact, as they would not be in float32."""
    generator = torch.Generator().manual_seed(0)
    partial = torch.randint(-(2**24), 2**24, shape, generator=generator).float().to(DEVICE)
    expected = partial.double().sum(dim=dim)
    assert not torch.equal(partial.cumsum(dim=dim).select(dim, -1).double(), expected)
    first, rest = torch.empty(2, device=DEVICE), torch.empty(expected.numel() - 2, device=DEVICE)
    _common.sum_partials(partial, dim, first, rest)
    assert torch.equal(torch.cat([first, rest]), expected.float())
    alone = torch.empty(expected.numel(), device=DEVICE)
    _common.sum_partials(partial, dim, alone)
    assert torch.equal(alone, expected.float())


def test_launches(normal, monkeypatch):
    """Nothing but these kernels: one for the values, and one for each reduction, of dmix and doffset together."""
    launched, computed = [], []
    for module in (_common, _elementwise, _flow_step_mix, flow_step):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    (x, mix, offset, h_before, h_after), both = step_inputs(normal, 4, False).values(), normal(8)
    with Watch(lambda name, _: computed.append(name)):
        kernels.affine_forward(x, both, 0, EPS, False)
        kernels.gaussian_split_backward(x, DLOGDET, x, h_before, False)
        kernels.flow_step_forward(x, mix, offset, h_before, h_after, EPS, False)
        kernels.flow_step_backward(x, DLOGDET, x, x, mix, h_before, h_after, EPS, False)
    assert launched == [
        *(
            "elementwise_forward_kernel",
            "sum_partials_kernel",
            "elementwise_backward_kernel",
            "flow_step_forward_kernel",
            "sum_partials_kernel",
        ),
        *("flow_step_backward_kernel", "flow_step_backward_weight_kernel", "sum_partials_kernel"),
    ]
    views = {"aten::slice", "aten::select", "aten::view"}
    assert set(computed) - views <= {"aten::empty", "aten::empty_like", "aten::fill_"}  # the last poisons


@pytest.mark.parametrize("size", [(0, 4, 4), (2, 0, 4)], ids=["no-sample", "no-row"])
def test_empty(normal, size):
    x, h, g, mix = normal(4, size=size), normal(8, size=size), DLOGDET[: size[0]], torch.eye(4, device=DEVICE)
    for y, logdet in (
        kernels.affine_forward(x, h, 0, EPS, False),
        kernels.gaussian_split_forward(x, h[:, :4], False),
        kernels.flow_step_forward(x, mix, mix[0], None, h, EPS, False),
    ):
        assert y.shape == x.shape and torch.equal(logdet, torch.zeros(size[0], device=DEVICE))
    assert [t.shape for t in kernels.affine_backward(x, g, x, h, 0, EPS, False)] == [x.shape, h.shape]
    dx, dmix, doffset, dh_before, dh_after = kernels.flow_step_backward(x, g, x, x, mix, None, h, EPS, False)
    assert dx.shape == x.shape and dh_before is None and dh_after.shape == h.shape
    assert torch.equal(dmix, torch.zeros_like(mix)) and torch.equal(doffset, torch.zeros_like(mix[0]))


def test_offsets_beyond_32_bits():
    """Three channels 2³⁰ elements apart, in memory of which only they are touched: the stride has 32 bits, its double not."""
    stride = 2**30
    storage = torch.UntypedStorage(2 * (2 * stride + 64), device=DEVICE)
    x = torch.tensor([], dtype=torch.bfloat16, device=DEVICE).set_(storage, 0, (1, 3, 1, 1), (stride, stride, 1, 1))
    x.copy_(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))
    turn = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], device=DEVICE)
    y, _ = kernels.flow_step_forward(x, turn, torch.zeros(3, device=DEVICE), None, None, EPS, False)
    assert y.flatten().tolist() == [3.0, 1.0, 2.0]
    h = torch.zeros(1, 6, 1, 1, device=DEVICE)
    assert torch.equal(kernels.affine_forward(x, h, 0, EPS, False)[0], kernels.affine_forward(x.clone(), h, 0, EPS, False)[0])


def test_float64_is_refused(normal):
    x, h, mix = normal(4).double(), normal(8), torch.eye(4, device=DEVICE)
    for call in (
        lambda: kernels.affine_forward(x, h, 0, EPS, False),
        lambda: kernels.affine_backward(x, DLOGDET, x, h, 0, EPS, False),
        lambda: kernels.gaussian_split_forward(x, h[:, :4], False),
        lambda: kernels.gaussian_split_backward(x, DLOGDET, x, h[:, :4], False),
        lambda: kernels.flow_step_forward(x, mix, mix[0], None, h, EPS, False),
        lambda: kernels.flow_step_backward(x, DLOGDET, x, x, mix, None, h, EPS, False),
    ):
        with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
            call()
