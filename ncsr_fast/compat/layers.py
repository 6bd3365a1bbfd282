"""Single layers of common Glow code on the fused operators.

Layers are recognised by parameters, attributes and signatures, and were verified against the code of

    chaiyujin/glow-pytorch     487a6b1   ActNorm2d, InvertibleConv1x1 (without LU), FlowStep (affine)
    y0ast/Glow-PyTorch         13c7b01   ActNorm2d, InvertibleConv1x1 (without LU)
    rosinality/glow-pytorch    97081ff   InvConv2d, AffineCoupling (affine), Flow with either convolution
    andreas128/SRFlow          5a007ad   ActNorm2d, InvertibleConv1x1
    younggeun-kim/NCSR         85bdaff   ActNorm2d, InvertibleConv1x1

A step becomes one operator for its actnorm and 1×1 convolution, with one determinant, and one operator for its coupling; the
network inside a coupling is called unchanged. An actnorm alone is one pass over its input. Actnorms that are not yet
initialised run their own code.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ncsr_fast import ops
from ncsr_fast.autocast import without_autocast
from ncsr_fast.compat.replacement import Passing, Replacement, Unsupported, check_tensor, expect
from ncsr_fast.precision import true_float32

_NO_EPS = 1e-37  # Glow's scale has no lower bound; the operator needs one above 0, and this one is lost in rounding
_SERVED = {  # values of attributes that the layers' code reads, if they exist
    "flow_permutation": "invconv",
    "flow_coupling": "affine",
    "affine": True,
    "logdet": True,
    "LU": False,
    "LU_decomposed": False,
}
_TRIAL_TOLERANCE = 1e-4  # relative to the largest element, or to 1; float32 rounding is below 1e-5


class LayerForward(Replacement):
    """Replacement of `forward(x, logdet=None, reverse=False)` → (y, logdet plus the map's log-det, or None)."""

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        try:
            x, logdet, reverse = _glow_arguments(arguments, options)
            self.check_call(x)
        except Unsupported as reason:
            return self.hand_over(reason, "forward", *arguments, **options)
        y, own = self.compute(x, reverse)
        return y, None if logdet is None else logdet + own

    @classmethod
    def described(cls) -> str:
        """Name of the replaced layer, for messages."""
        return cls.__doc__.splitlines()[0].rstrip(".").replace("`", "")

    def check_call(self, x: Tensor) -> None:
        """Raise Unsupported unless the layer is initialised and x is a valid input."""
        self.check()
        check_attributes(type(self), self.module)
        like = self.weight()
        if like.dtype not in (torch.float32, torch.float64):
            raise Unsupported(f"its parameters are {like.dtype}")
        check_tensor("input", x, (None, self.channels(), None, None), like)
        if not all(x.shape):
            raise Unsupported("the input is empty")
        for actnorm in self.actnorms():
            # the flag of NCSR and Glow, or the buffer of rosinality
            if not bool(getattr(actnorm, "inited", getattr(actnorm, "initialized", True))):
                raise Passing("an actnorm is not initialised, which its own forward does")

    def actnorms(self) -> list[nn.Module]:
        return []

    def weight(self) -> Tensor:
        """A parameter of the layer."""
        return self.module.weight

    def channels(self) -> int:
        return self.weight().shape[0]

    def compute(self, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """The map or its inverse, and its log-det: (), or (B,) if it depends on the sample."""
        raise NotImplementedError


class ActNorm(LayerForward):
    """Glow's `ActNorm2d`: parameters bias and logs (1, C, 1, 1)."""

    def actnorms(self) -> list[nn.Module]:
        return [self.module]

    def weight(self) -> Tensor:
        return self.module.bias

    def channels(self) -> int:
        return self.module.bias.shape[1]

    def compute(self, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        bias, logs = self.module.bias, self.module.logs
        scale = torch.exp(-logs if reverse else logs)
        y = torch.addcmul(-bias if reverse else bias * scale, x, scale)
        logdet = logs.sum() * (x.shape[2] * x.shape[3])
        return y, -logdet if reverse else logdet


class InvConv(LayerForward):
    """Glow's `InvertibleConv1x1`: one parameter weight (C, C)."""

    def compute(self, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        return _mix(x, None, None, self.module.weight, reverse)


class Step(LayerForward):
    """Glow's `FlowStep`: actnorm, invconv, and an affine coupling whose network is `f` or `block`."""

    passed_over = ("actnorm", "invconv")

    def actnorms(self) -> list[nn.Module]:
        return [self.module.actnorm]

    def weight(self) -> Tensor:
        return self.module.invconv.weight

    def compute(self, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        network = getattr(self.module, "f", None) or self.module.block
        norm = self.module.actnorm
        mixing = norm.bias.flatten(), norm.logs.flatten(), self.module.invconv.weight
        if reverse:
            x, coupling_logdet = _couple(x, network(_pass_through(x)), True)
            x, mixing_logdet = _mix(x, *mixing, True)
        else:
            x, mixing_logdet = _mix(x, *mixing, False)
            x, coupling_logdet = _couple(x, network(_pass_through(x)), False)
        return x, mixing_logdet + coupling_logdet


class ReversibleLayer(LayerForward):
    """Replacement of rosinality's layers: `forward(x)` → (y, logdet), `reverse(y)` → x."""

    methods = ("forward", "reverse")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            self.check_call(x)
        except Unsupported as reason:
            return self.hand_over(reason, "forward", x)
        return self.compute(x, False)

    def reverse(self, y: Tensor) -> Tensor:
        try:
            self.check_call(y)
        except Unsupported as reason:
            return self.hand_over(reason, "reverse", y)
        return self.compute(y, True)[0]


class ReversibleInvConv(ReversibleLayer):
    """`InvConv2d`: one parameter weight (C, C, 1, 1)."""

    def compute(self, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        return _mix(x, None, None, self.module.weight[:, :, 0, 0], reverse)


class ReversibleCoupling(ReversibleLayer):
    """`AffineCoupling`, whose network `net` gives all raw scales, then all shifts."""

    passed_over = ()

    def weight(self) -> Tensor:
        return self.module.net[0].weight

    def channels(self) -> int:
        return 2 * self.weight().shape[1]

    def compute(self, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        raw, shift = self.module.net(_pass_through(x)).chunk(2, dim=1)
        return _couple(x, torch.stack([shift, raw], dim=2).flatten(1, 2), reverse)


class ReversibleStep(ReversibleLayer):
    """`Flow`: actnorm with loc and scale, either 1×1 convolution, and a coupling, which is called."""

    passed_over = ("actnorm", "invconv")

    def actnorms(self) -> list[nn.Module]:
        return [self.module.actnorm]

    def weight(self) -> Tensor:
        return self.module.actnorm.loc

    def channels(self) -> int:
        return self.weight().shape[1]

    def compute(self, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor | None]:
        loc, scale = self.module.actnorm.loc.flatten(), self.module.actnorm.scale.flatten()
        invconv = self.module.invconv
        weight = invconv.calc_weight() if hasattr(invconv, "calc_weight") else invconv.weight
        # the scale may be negative, so its sign is multiplied into the matrix
        mixing = loc, torch.log(scale.abs()), weight[:, :, 0, 0] * scale.detach().sign()
        if reverse:
            return _mix(self.module.coupling.reverse(x), *mixing, True)
        x, mixing_logdet = _mix(x, *mixing, False)
        x, coupling_logdet = self.module.coupling(x)
        return x, mixing_logdet if coupling_logdet is None else mixing_logdet + coupling_logdet


def _glow_arguments(arguments: tuple, options: dict[str, Any]) -> tuple[Tensor, Any, bool]:
    """The arguments input, logdet and reverse; raise Unsupported for other arguments."""
    names = ("input", "logdet", "reverse")
    given = dict(zip(names, arguments)) | options
    if len(arguments) > 3 or not set(given) <= set(names) or "input" not in given:
        raise Unsupported("its arguments are not input, logdet and reverse")
    return given["input"], given.get("logdet"), given.get("reverse", False)


def _pass_through(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2]


def _mix(x: Tensor, bias: Tensor | None, logs: Tensor | None, weight: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Actnorm and 1×1 convolution, or the convolution alone; the log-det () holds for every sample."""
    if bias is None:
        bias = logs = weight.new_zeros(weight.shape[0])
    y, logdet = ops.actnorm_invconv(x, bias, logs, weight, inverse=reverse)
    return y, logdet[0]


def _couple(x: Tensor, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    return ops.affine_coupling(x, h, _NO_EPS, inverse=reverse)


def candidate(module: nn.Module) -> type[LayerForward] | None:
    """The kind of replacement for a module with these parameters and children."""
    own = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    children = {name for name, _ in module.named_children()}
    reversible = callable(getattr(module, "reverse", None))
    first = next(iter(own.values()), ())
    if {"actnorm", "invconv", "coupling"} == children and hasattr(module.actnorm, "loc") and reversible:
        return ReversibleStep
    if children in ({"actnorm", "invconv", "f"}, {"actnorm", "invconv", "block"}):
        return Step
    if children == {"net"} and hasattr(module, "affine") and reversible:
        return ReversibleCoupling
    if not children and set(own) == {"bias", "logs"} and own["bias"] == own["logs"] == (1, *first[1:2], 1, 1):
        return ActNorm
    if not children and set(own) == {"weight"} and first[:1] == first[1:2]:
        if len(first) == 2 and hasattr(module, "w_shape"):
            return InvConv
        if len(first) == 4 and first[2:] == (1, 1) and reversible and not isinstance(module, nn.Conv2d):
            return ReversibleInvConv
    return None


def check_attributes(kind: type[LayerForward], module: nn.Module) -> None:
    """Raise Unsupported if an attribute of the layer, or of a child that is not called, changes what it computes."""
    expect(module, "layer", **_SERVED)
    for name in kind.passed_over or ():
        expect(getattr(module, name), name, **_SERVED)


def check_layer(kind: type[LayerForward], module: nn.Module) -> None:
    """Raise Unsupported if the layer computes something else than its replacement."""
    check_attributes(kind, module)
    if kind is Step and ("weight" not in module.invconv._parameters or candidate(module.actnorm) is not ActNorm):
        raise Unsupported("its 1×1 convolution is decomposed, or its actnorm is of another kind")
    if not issubclass(kind, ReversibleLayer):
        arguments = list(inspect.signature(type(module).forward).parameters)[1:4]
        if arguments != ["input", "logdet", "reverse"]:
            raise Unsupported(f"its forward takes ({', '.join(arguments)}, …) instead of (input, logdet, reverse)")
    _try(kind, module)


@torch.no_grad()
def _try(kind: type[LayerForward], module: nn.Module) -> None:
    """Run a copy of the layer and its replacement on a small input, in both directions."""
    trial = copy.deepcopy(module).float().eval()
    for part in trial.modules():
        if hasattr(part, "inited"):
            part.inited = True
        if isinstance(getattr(part, "initialized", None), Tensor):
            part.initialized.fill_(1)
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        parameter.add_(1e-2 * torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter))
    replacement = kind(trial)
    x = torch.randn(2, replacement.channels(), 2, 3, generator=generator, device="cpu").to(next(trial.parameters()))
    with true_float32(x), without_autocast(x.device.type):
        for theirs, ours in _both_directions(replacement, x):
            if not float((theirs - ours).abs().max()) <= _TRIAL_TOLERANCE * max(1.0, float(theirs.abs().max())):
                raise Unsupported(f"it computes something else than {kind.described()}")
    if replacement.handed_over:
        raise Unsupported(next(iter(replacement.handed_over)))


def _both_directions(replacement: LayerForward, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(replacement, ReversibleLayer):
        yield from zip(replacement.own("forward", x), replacement.forward(x))
        yield replacement.own("reverse", x), replacement.reverse(x)
        return
    logdet = x.new_zeros(len(x))
    for reverse in (False, True):
        yield from zip(replacement.own("forward", x, logdet, reverse), replacement.forward(x, logdet, reverse))
