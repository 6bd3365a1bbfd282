"""Single layers of Glow code, written here as that code has them, against what replaces them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from compat.standin import ActNorm2d, InvertibleConv1x1, small_network
from support import image, randomize, relative_error
from torch import nn

import ncsr_fast
from ncsr_fast.compat import layers

C = 6
pytestmark = pytest.mark.filterwarnings("ignore:the accelerated:RuntimeWarning")  # tests/compat/test_family.py tests those


class FlowStep(nn.Module):
    """Of chaiyujin's Glow: the coupling is in the step, and its scale has no lower bound."""

    def __init__(self, coupling: str = "affine") -> None:
        super().__init__()
        self.flow_permutation, self.flow_coupling = "invconv", coupling
        self.actnorm, self.invconv, self.f = ActNorm2d(C), InvertibleConv1x1(C), small_network(C // 2, 8, C)

    def couple(self, z, logdet, reverse):
        z1, z2 = z.chunk(2, dim=1)
        h = self.f(z1)
        shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
        z2 = z2 / scale - shift if reverse else (z2 + shift) * scale
        change = scale.log().sum(dim=(1, 2, 3))
        return torch.cat([z1, z2], dim=1), logdet - change if reverse else logdet + change

    def forward(self, input, logdet=None, reverse=False):
        if reverse:
            return self.actnorm(*self.invconv(*self.couple(input, logdet, True), True), True)
        return self.couple(*self.invconv(*self.actnorm(input, logdet)), False)


class Norm(nn.Module):
    """Of rosinality's Glow, like all below."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(1, C, 1, 1)), nn.Parameter(torch.ones(1, C, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.logdet = True

    def forward(self, x):
        if not self.initialized:
            with torch.no_grad():
                self.loc.copy_(-x.mean(dim=(0, 2, 3), keepdim=True))
                self.scale.copy_(1 / (x.std(dim=(0, 2, 3), keepdim=True) + 1e-6))
            self.initialized.fill_(1)
        return self.scale * (x + self.loc), x.shape[2] * x.shape[3] * self.scale.abs().log().sum()

    def reverse(self, y):
        return y / self.scale - self.loc


class InvConv2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(C, C))[0][:, :, None, None])

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight), x.shape[2] * x.shape[3] * torch.slogdet(self.weight[:, :, 0, 0])[1]

    def reverse(self, y):
        return nn.functional.conv2d(y, self.weight[:, :, 0, 0].inverse()[:, :, None, None])


class AffineCoupling(nn.Module):
    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.affine = affine
        self.net = nn.Sequential(nn.Conv2d(C // 2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, C, 3, padding=1))

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        raw, shift = self.net(a).chunk(2, dim=1)
        scale = torch.sigmoid(raw + 2)
        return torch.cat([a, (b + shift) * scale], dim=1), scale.log().flatten(1).sum(dim=1)

    def reverse(self, y):
        a, b = y.chunk(2, dim=1)
        raw, shift = self.net(a).chunk(2, dim=1)
        return torch.cat([a, b / torch.sigmoid(raw + 2) - shift], dim=1)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actnorm, self.invconv, self.coupling = Norm(), InvConv2d(), AffineCoupling()

    def forward(self, x):
        x, first = self.actnorm(x)
        x, second = self.invconv(x)
        x, third = self.coupling(x)
        return x, first + second + third

    def reverse(self, y):
        return self.actnorm.reverse(self.invconv.reverse(self.coupling.reverse(y)))


LAYERS = {
    "actnorm": (lambda: ActNorm2d(C), "Glow's ActNorm2d: parameters bias and logs (1, C, 1, 1)"),
    "invconv": (lambda: InvertibleConv1x1(C), "Glow's InvertibleConv1x1: one parameter weight (C, C)"),
    "step": (FlowStep, "Glow's FlowStep: actnorm, invconv, and an affine coupling whose network is f or block"),
    "reversible-invconv": (InvConv2d, "InvConv2d: one parameter weight (C, C, 1, 1)"),
    "reversible-coupling": (AffineCoupling, "AffineCoupling, whose network net gives all raw scales, then all shifts"),
    "reversible-step": (Flow, "Flow: actnorm with loc and scale, either 1×1 convolution, and a coupling, which is called"),
}


def twins(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = randomize(LAYERS[name][0](), amount=0.1).to(dtype)
    for part in layer.modules():
        if isinstance(part, Norm):
            part.initialized.fill_(1)
            part.scale.data[0, 0] *= -1  # training may take it there
        if isinstance(part, ActNorm2d):
            part.inited = True
    return layer, copy.deepcopy(layer)


def calls(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of both directions, with and without a log-det."""
    if hasattr(layer, "reverse"):
        return [*layer(x), layer.reverse(x)]
    logdet = torch.arange(len(x), dtype=x.dtype)
    scalar = [] if isinstance(layer, FlowStep) else [*layer(x, logdet[1]), layer(x)[0], layer(x, reverse=True)[0]]
    return [*layer(x, logdet), *layer(x, logdet=logdet, reverse=True), *scalar]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name, dtype):
    layer, untouched = twins(name, dtype)
    report = ncsr_fast.accelerate(layer)
    assert report.replaced[""] == LAYERS[name][1]
    allowed = 1e-12 if dtype == torch.float64 else 2e-5
    results = []
    for one in (layer, untouched):
        x = image(2, C, 3, 4, dtype=dtype).requires_grad_()
        values = calls(one, x)
        sum((value * torch.linspace(1, 2, value.numel(), dtype=dtype).view(value.shape)).sum() for value in values).backward()
        results.append([*values, x.grad, *(parameter.grad for parameter in one.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert relative_error(ours.detach(), theirs.detach()) <= allowed
    assert not report.handed_over


@pytest.mark.parametrize("name", ["actnorm", "step", "reversible-step"])
def test_first_batches_are_left_to_the_layers_own_code(name):
    torch.manual_seed(0)
    layer = LAYERS[name][0]().double().train()
    untouched = copy.deepcopy(layer)
    report = ncsr_fast.accelerate(layer)
    for step in range(2):
        x = 3 + image(2, C, 3, 4, seed=step)
        logdet = () if name == "reversible-step" else (torch.zeros(2, dtype=x.dtype),)
        for ours, theirs in zip(layer(x, *logdet), untouched(x, *logdet)):
            assert relative_error(ours.detach(), theirs.detach()) <= 1e-12
    assert set(report.handed_over) == {"an actnorm is not initialised, which its own forward does"}
    expected = untouched.state_dict()
    assert all(
        relative_error(value, expected[key]) <= 1e-12 for key, value in layer.state_dict().items() if expected[key].any()
    )


def test_a_model_of_layers_is_replaced_and_restored():
    model = nn.ModuleList([twins("step")[0], nn.Conv2d(3, 3, 1), twins("reversible-step")[0]])
    report = ncsr_fast.accelerate(model)
    assert list(report.replaced) == ["0", "0.f.0.actnorm", "0.f.2.actnorm", "2", "2.coupling"] and not report.left
    ncsr_fast.restore(model)
    assert not any("forward" in part.__dict__ or "reverse" in part.__dict__ for part in model.modules())


def test_hooks_inside_a_step():
    layer, untouched = twins("step")
    report = ncsr_fast.accelerate(layer)
    x, seen = image(2, C, 3, 4), []
    layer.f.register_forward_hook(lambda *arguments: seen.append("f"))  # is called
    layer(x, torch.zeros(2))
    assert seen == ["f"] and not report.handed_over
    layer.invconv.register_forward_hook(lambda *arguments: seen.append("invconv"))
    assert relative_error(layer(x, torch.zeros(2))[0].detach(), untouched(x, torch.zeros(2))[0].detach()) <= 1e-12
    assert seen == ["f", "invconv", "f"] and report.handed_over == {"invconv has hooks, which would not run": 1}


class ExpCoupling(AffineCoupling):
    """Its scale is exp(raw)."""

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        raw, shift = self.net(a).chunk(2, dim=1)
        return torch.cat([a, b * raw.exp() + shift], dim=1), raw.flatten(1).sum(dim=1)


class MaskedActNorm(ActNorm2d):
    def forward(self, input, mask, logdet=None, reverse=False):
        return super().forward(input, logdet, reverse)


REFUSED = {
    "formula": (ExpCoupling, "it computes something else than AffineCoupling"),
    "additive": (lambda: AffineCoupling(affine=False), "affine is False, and only True is served"),
    "additive step": (lambda: FlowStep("additive"), "flow_coupling is 'additive', and only 'affine'"),
    "signature": (lambda: MaskedActNorm(C), r"its forward takes \(input, mask, logdet, …\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    build, reason = REFUSED[what]
    layer = build()
    try:
        left = ncsr_fast.accelerate(layer).left[""]  # what is inside may be served
    except ValueError as error:
        left = str(error)
    assert re.search(reason, left)


def test_modules_with_parameters_of_such_names():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.logs = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    for module in (Other(), nn.PReLU(), nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 3, bias=False), nn.LayerNorm(3)):
        assert layers.candidate(module) is None


def test_a_replica_reads_its_own_parameters():
    layer, untouched = twins("invconv")
    ncsr_fast.accelerate(layer)
    replica = layer._replicate_for_data_parallel()
    replica.weight = 2 * layer.weight.detach()
    x = image(2, C, 3, 4)
    assert relative_error(replica(x)[0], 2 * untouched(x)[0].detach()) <= 1e-12


def test_calls_that_are_not_served():
    layer, untouched = twins("actnorm")
    report = ncsr_fast.accelerate(layer)
    x = image(2, C, 3, 4)
    assert layer(x[:0])[0].shape == (0, C, 3, 4)
    assert layer(x.float())[0].dtype == untouched(x.float())[0].dtype
    assert report.handed_over == {"the input is empty": 1, "input has another dtype or device than the parameters": 1}


CHANGED = {
    "layer.flow_coupling is 'additive', and only 'affine' is served": ("step", "", "flow_coupling", "additive"),
    "invconv.LU is True, and only False is served": ("step", "invconv", "LU", True),
    "layer.affine is False, and only True is served": ("reversible-coupling", "", "affine", False),
    "layer.flow_permutation is 'shuffle', and only 'invconv' is served": ("actnorm", "", "flow_permutation", "shuffle"),
    "actnorm.logdet is False, and only True is served": ("reversible-step", "actnorm", "logdet", False),
}


@pytest.mark.parametrize("reason", CHANGED)
def test_layers_changed_afterwards_run_their_own_code(reason):
    name, path, attribute, value = CHANGED[reason]
    layer, untouched = twins(name)
    report = ncsr_fast.accelerate(layer)
    for one in (layer, untouched):
        setattr(one.get_submodule(path), attribute, value)
    x = image(2, C, 3, 4)
    arguments = (x,) if hasattr(layer, "reverse") else (x, x.new_zeros(2))
    for ours, theirs in zip(layer(*arguments), untouched(*arguments), strict=True):
        assert relative_error(ours.detach(), theirs.detach()) <= 1e-12  # actnorms inside the network are served
    assert report.handed_over == {reason: 1}


def test_every_layer_has_a_sentence():
    kinds = [layers.ActNorm, layers.InvConv, layers.Step, layers.ReversibleInvConv, layers.ReversibleCoupling]
    assert len({kind.described() for kind in [*kinds, layers.ReversibleStep]}) == 6
