"""A Triton kernel that does not compile or start: one warning, another backend's results; and errors that are none of that."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import installation
import operator_cases
import pytest
import torch
from torch import Tensor

from ncsr_fast import ops
from ncsr_fast.ops import backend as backends
from ncsr_fast.ops import reference
from ncsr_fast.ops.fallback import Guarded

if not installation.expects("triton"):
    pytest.skip("the Triton backend is not among the cells", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from ncsr_fast import kernels as triton_kernels  # noqa: E402
from ncsr_fast.kernels import _common, _elementwise  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Broken:
    """A kernel that raises when it is started."""

    def __init__(self, error: Exception) -> None:
        self.error, self.started = error, 0
        self.fn = SimpleNamespace(__name__="broken_kernel")

    def __getitem__(self, grid: tuple[int, ...]):
        def start(**arguments):
            self.started += 1
            raise self.error

        return start


@triton.jit
def wrong_kernel(x, h, y, p_partial, pass_through, constant, channels, pixels, width, MAP: tl.constexpr, INVERSE: tl.constexpr,
                 CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    tl.store(p_partial, tl.no_such_function(BLOCK_P))


@pytest.fixture
def auto(monkeypatch):
    """ "auto" that prefers Triton here, in a process where no test has asked for it by name."""
    monkeypatch.setattr(backends, "_named", set())
    monkeypatch.setattr(backends, "_order", lambda kernel, kind, dtype: ("triton",))
    backends._refusal.forget()
    backends.forget()
    backends.kernels.cache_clear()
    yield
    backends.forget()
    backends.kernels.cache_clear()


def break_forward(monkeypatch, error: Exception) -> Broken:
    kernel = Broken(error)
    monkeypatch.setattr(_elementwise, "elementwise_forward_kernel", kernel)
    return kernel


def tensors(requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((2, 4, 3, 5), (2, 8, 3, 5)))
    z, h = (tensor.requires_grad_(requires_grad) for tensor in drawn)
    return z, h


def test_one_warning_and_the_reference_from_then_on(auto, monkeypatch):
    kernel = break_forward(monkeypatch, RuntimeError("PassManager::run failed\nand where"))
    z, h = tensors()
    expected = ops.affine_injector(z, h, backend="reference")
    with pytest.warns(RuntimeWarning) as caught:
        found = ops.affine_injector(z, h)
    assert [str(each.message) for each in caught] == [
        "the kernel broken_kernel of affine_forward failed: RuntimeError: PassManager::run failed; "
        "from now on the backend 'reference' runs instead"
    ]
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ops.affine_injector(z, h)
    assert kernel.started == 1
    for a, b, c in zip(found, again, expected):
        assert torch.equal(a, c) and torch.equal(b, c)


def test_a_kernel_that_the_interpreter_cannot_run(auto, monkeypatch):
    monkeypatch.setattr(_elementwise, "elementwise_forward_kernel", wrong_kernel)
    z, h = tensors()
    with pytest.warns(RuntimeWarning, match="kernel wrong_kernel of affine_forward failed: .*no_such_function"):
        found = ops.affine_injector(z, h)
    assert all(map(torch.equal, found, ops.affine_injector(z, h, backend="reference")))


def test_the_gradient_of_what_ran_instead(auto, monkeypatch):
    """The backward kernel still runs: one function is replaced, not the backend."""
    break_forward(monkeypatch, RuntimeError("no"))
    gradients = {}
    for backend in ("reference", "auto"):
        z, h = tensors(requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            y, logdet = ops.affine_injector(z, h, backend=backend)
        gradients[backend] = torch.autograd.grad(y.square().sum() + logdet.sum(), (z, h))
    for found, expected in zip(gradients["auto"], gradients["reference"]):
        assert torch.allclose(
            found, expected, rtol=0, atol=operator_cases.ROUNDING[torch.float32] * float(expected.abs().max())
        )


def test_another_backend_that_has_the_kernel_goes_before_the_reference(auto, monkeypatch):
    if not backends.backends("cpu")["native"].available:
        pytest.skip("the native backend is not here")
    monkeypatch.setattr(backends, "_order", lambda kernel, kind, dtype: ("triton", "native"))
    break_forward(monkeypatch, RuntimeError("no"))
    z, h = (tensor.cpu() for tensor in tensors())
    with pytest.warns(RuntimeWarning, match="from now on the backend 'native' runs instead"):
        found = triton_kernels_guarded().affine_forward(z, h, 0, 1e-4, False)
    assert all(map(torch.equal, found, backends.kernels("native").affine_forward(z, h, 0, 1e-4, False)))


def test_a_backend_that_was_named_raises(auto, monkeypatch):
    error = RuntimeError("PassManager::run failed")
    kernel = break_forward(monkeypatch, error)
    z, h = tensors()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="PassManager::run failed"):
            ops.affine_injector(z, h, backend="triton")
    assert kernel.started == 2


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)"),
        TypeError("missing a required argument: 'x'"),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
    ids=repr,
)
def test_errors_of_arguments_of_memory_and_of_earlier_kernels_are_raised(auto, monkeypatch, error):
    kernel = break_forward(monkeypatch, error)
    z, h = tensors()
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            ops.affine_injector(z, h)
        assert caught.value is error
    assert kernel.started == 2


def test_the_checks_of_a_host_function_are_raised(auto):
    z, h = (tensor.double() for tensor in tensors())
    with pytest.raises(TypeError, match="compute in float32, not torch.float64"):
        triton_kernels_guarded().affine_forward(z, h, 0, 1e-4, False)


@pytest.mark.parametrize("option", ["accumulate", "dx"])
def test_what_was_added_already_is_not_added_again(option):
    """A function that adds to an argument, and whose second kernel fails, has no replacement for that call."""
    total, options = torch.zeros(3), {"accumulate": True} if option == "accumulate" else {"dx": torch.zeros(3)}

    def conv3x3_forward(x: Tensor, kernels: int, **options) -> Tensor:
        for _ in range(kernels):
            _common.launch(lambda_kernel(lambda: total.add_(x)), 1, x.device)
        return _common.launch(Broken(RuntimeError("no")), 1, x.device)

    def instead(kernel: str, function: str, like: Tensor):
        return "reference", lambda x, kernels, **options: total.add_(x)

    module = SimpleNamespace(
        conv3x3_forward=conv3x3_forward, KernelFailure=triton_kernels.KernelFailure, launched=triton_kernels.launched
    )
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="^no$"):
        Guarded(module, instead).conv3x3_forward(x, 1, **options)
    assert total.tolist() == [1, 1, 1]
    with pytest.warns(RuntimeWarning):
        Guarded(module, instead).conv3x3_forward(x, 0, **options)
    assert total.tolist() == [2, 2, 2]


def lambda_kernel(run) -> object:
    """A kernel that is started by a call of `run`."""

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda **arguments: run()

    return Kernel()


def triton_kernels_guarded() -> Guarded:
    return backends.kernels("triton")


def test_only_what_is_there_is_guarded():
    guarded = triton_kernels_guarded()
    assert guarded.affine_forward is guarded.affine_forward
    assert not hasattr(guarded, "fold_forward") and hasattr(reference, "fold_forward")
