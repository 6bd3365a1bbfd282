"""PyTorch's flags of float32: their values, what looks at them during a pass, and a pass to look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import image, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from ncsr_fast.engine.options import EngineOptions

PER_OPERATOR = hasattr(torch.backends.cudnn, "conv")  # torch ≥ 2.9
needs_per_operator = pytest.mark.skipif(not PER_OPERATOR, reason="flags of one operator each came with torch 2.9")


def of_mkldnn(operator: str, value: str) -> None:
    torch._C._set_fp32_precision_setter("mkldnn", operator, value)


def of_all(value: str) -> None:
    torch.backends.fp32_precision = value


SETTINGS = {precision: [(torch.set_float32_matmul_precision, precision)] for precision in ("highest", "high", "medium")}
if PER_OPERATOR:
    SETTINGS |= {
        "convolutions": [(of_mkldnn, "conv", "bf16")],
        "products": [(of_mkldnn, "matmul", "tf32")],
        "backend": [(of_mkldnn, "all", "bf16")],
        "all": [(of_all, "tf32")],
        "all, and backend": [(of_all, "tf32"), (of_mkldnn, "all", "tf32")],
        "all, and one": [(of_all, "tf32"), (of_mkldnn, "conv", "bf16")],
        "one, and it is exact": [(of_all, "bf16"), (of_mkldnn, "conv", "ieee")],
    }
WORST = "all, and one" if PER_OPERATOR else "medium"


def set_flags(setting: str) -> dict[str, str]:
    """Set them; returns what they are then."""
    for setter, *arguments in SETTINGS[setting]:
        setter(*arguments)
    return values()


def values() -> dict[str, str]:
    """Every flag as it is now, and as it would be were another value set for all backends: it may inherit that."""
    if not PER_OPERATOR:
        return {"matmul": torch.get_float32_matmul_precision(), "cudnn": str(torch.backends.cudnn.allow_tf32)}
    names = [(backend, operator) for backend in ("mkldnn", "cuda") for operator in ("all", "conv", "rnn", "matmul")]
    now, found = torch.backends.fp32_precision, {"generic/all": torch.backends.fp32_precision}
    for of_all_backends in ("none", "ieee", "tf32"):
        torch.backends.fp32_precision = of_all_backends
        found |= {f"{b}/{o} if {of_all_backends}": torch._C._get_fp32_precision_getter(b, o) for b, o in names}
    torch.backends.fp32_precision = now
    return found


def put_back() -> Iterator[None]:
    """The body of a fixture: the defaults, before and after each test."""
    reset()
    yield
    reset()


def reset() -> None:
    torch.set_float32_matmul_precision("highest")
    if PER_OPERATOR:
        torch.backends.fp32_precision = "none"
        for name in ("mkldnn/all", "mkldnn/conv", "mkldnn/matmul", "cuda/matmul"):
            torch._C._set_fp32_precision_setter(*name.split("/"), "none")


def exact_on_cpu(convolution: bool = True) -> bool:
    """Whether PyTorch would round no operand of a float32 convolution (it computes some as products), or of a product."""
    if not PER_OPERATOR:
        return torch.get_float32_matmul_precision() == "highest"
    operators = ("conv", "matmul") if convolution else ("matmul",)
    return {getattr(torch.backends.mkldnn, operator).fp32_precision for operator in operators} <= {"ieee", "none"}


class Watch(TorchDispatchMode):
    """Calls a function at every convolution and every product, and asserts that the flags round none of float32 there."""

    CONVOLUTIONS = (
        "convolution", "_convolution", "convolution_backward", "_convolution_double_backward", "convolution_overrideable",
        "mkldnn_convolution", "thnn_conv2d", "slow_conv2d_forward",
    )  # fmt: skip
    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear", "matmul", "einsum")

    def __init__(self, call=lambda: None) -> None:
        super().__init__()
        self.call, self.convolutions, self.products = call, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name in self.CONVOLUTIONS or name in self.PRODUCTS:
            self.convolutions += name in self.CONVOLUTIONS
            self.products += name in self.PRODUCTS
            self.call()
            float32 = any(isinstance(argument, torch.Tensor) and argument.dtype == torch.float32 for argument in args)
            assert not float32 or exact_on_cpu(name in self.CONVOLUTIONS), f"{name} may be rounded"
        return function(*args, **(kwargs or {}))


LR, HR = image(1, 3, 4, 4, dtype=torch.float32), image(1, 3, 16, 16, dtype=torch.float32)


def model_of(engine: str, backend: str):
    model = tiny_model(dtype=torch.float32, steps=2, noise_steps=(0, 2, 2))
    model.options = EngineOptions(engine=engine, backend=backend)
    return model


def gradients(module: torch.nn.Module, value: torch.Tensor) -> list[torch.Tensor]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def nll(model) -> list[torch.Tensor]:
    value = model.nll(HR, LR)
    return [value.detach(), *gradients(model, value.sum())]
