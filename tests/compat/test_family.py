"""`accelerate` on the networks of SRFlow-DA, CTFlow and LLFlow, and on flows beside another encoder."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from compat import family
from compat.members import CT, DA, LL, PUBLISHED, STAND_INS, accelerated_twins
from compat.test_network import FLOAT32, FLOAT64, assert_close, assert_served
from operator_cases import marked
from support import image, relative_error

import ncsr_fast

every_member = pytest.mark.parametrize("member", [*STAND_INS, *PUBLISHED], ids=lambda member: member.name)
slow_but_for_one = marked("slow", lambda member: member is not LL)
# their networks are held to vectors by tests/flow/test_family.py, and names and shapes of layers are compared in recognition
exhaustive_but_for_three = marked("exhaustive", lambda member: member in STAND_INS and member not in (DA, CT, LL))


def seeded(call, seed: int = 3):
    """The result of a call that draws random numbers, and those drawn next."""
    torch.manual_seed(seed)
    random.seed(seed)
    return *call(), torch.tensor([float(torch.rand(())), random.random()])


def gradients(net, images, seed: int = 0) -> dict[str, torch.Tensor | None]:
    random.seed(seed)
    net.zero_grad()
    net(**images)[1].mean().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@slow_but_for_one
@exhaustive_but_for_three
@every_member
def test_encoding_and_every_gradient_in_float64(member):
    net, untouched, report = accelerated_twins(member)
    images = member.images()
    for arguments in ({}, {"epses": []}, {"add_gt_noise": True}):
        results = [seeded(lambda one=one: one(**images, **copy.deepcopy(arguments))) for one in (net, untouched)]
        assert_close(*results, FLOAT64)
    for seed in (0, 1):  # of LLFlow's draws one has each mean
        found = [gradients(one, images, seed) for one in (net, untouched)]
        assert [name for name, gradient in found[0].items() if gradient is None] == [
            name for name, gradient in found[1].items() if gradient is None
        ]
        worst = {name: relative_error(found[0][name], each) for name, each in found[1].items() if each is not None}
        assert max(worst.values()) <= FLOAT64, max(worst, key=worst.get)
    assert_served(report)


@pytest.mark.slow
@exhaustive_but_for_three
@every_member
def test_seeded_samples_are_the_same_samples(member):
    net, untouched, report = accelerated_twins(member, torch.float32)
    images = member.images(torch.float32)
    lr = images["lr"]
    with torch.no_grad():
        encoded = untouched(**images, epses=[])[0]
    z = 0.8 * torch.randn(encoded[-1].shape, generator=torch.Generator().manual_seed(5))
    for arguments in ({"z": z}, {"z": z, "add_gt_noise": True}, {"epses": encoded}):
        results = [seeded(lambda one=one: one(lr=lr, eps_std=0.8, reverse=True, **arguments), 4) for one in (net, untouched)]
        assert not results[0][0].requires_grad
        assert_close(*results, FLOAT32)
    assert_served(report)


@pytest.mark.slow
@pytest.mark.parametrize("member", [DA, LL], ids=lambda member: member.name)
def test_features_that_are_given(member):
    net, untouched, report = accelerated_twins(member)
    images = member.images()
    features = untouched.rrdbPreprocessing(images["lr"])
    results = [seeded(lambda one=one: one(**images, lr_enc=features)) for one in (net, untouched)]
    assert_close(*results, FLOAT64)
    z = torch.zeros_like(results[0][0])
    results = [
        seeded(lambda one=one: one(lr=images["lr"], z=z, eps_std=0.5, reverse=True, lr_enc=features))
        for one in (net, untouched)
    ]
    assert_close(*results, FLOAT64)
    assert_served(report)


@pytest.mark.slow
@pytest.mark.parametrize("member", [DA, LL], ids=lambda member: member.name)
def test_gradients_through_the_inverse(member):
    net, untouched, report = accelerated_twins(member)
    images = member.images()
    z = torch.randn(untouched(**images)[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = []
    for one in (net, untouched):
        torch.manual_seed(6)
        lr = images["lr"].clone().requires_grad_()
        one.zero_grad()
        result = one(lr=lr, z=z, eps_std=0.3, reverse=True, reverse_with_grad=True)
        (result[0].square().sum() + result[1].sum()).backward()
        found.append([*result, lr.grad, *(p.grad for p in one.parameters() if p.grad is not None)])
    assert_close(*found, FLOAT64)
    assert_served(report)


@pytest.mark.slow
def test_images_whose_lr_sides_are_odd():
    """Nothing in SRFlow-DA needs even ones, and its validation has them."""
    net, untouched, report = accelerated_twins(DA)
    images = {"lr": image(1, 3, 9, 7), "gt": image(1, 3, 36, 28, seed=2)}
    assert_close(net(**images), untouched(**images), FLOAT64)
    assert_served(report)


@pytest.mark.slow
@pytest.mark.parametrize("member", [DA, LL], ids=lambda member: member.name)
def test_a_fresh_network_initialises_itself_and_trains_as_if_left_alone(member):
    net = member.fresh().double().train()
    untouched = copy.deepcopy(net)
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-3) for one in (net, untouched)]
    report = ncsr_fast.accelerate(net)
    for step in range(4):
        images, losses = member.images(seed=10 * step), []
        for one, optimizer in zip((net, untouched), optimizers):
            torch.manual_seed(step)
            random.seed(step)
            optimizer.zero_grad()
            losses.append(one(**images, add_gt_noise=True)[1].mean())
            losses[-1].backward()
            optimizer.step()
        assert_close(losses[:1], losses[1:], FLOAT64)
    assert_served(report, calls=1)
    expected = untouched.state_dict()
    assert list(net.state_dict()) == list(expected)
    moved = {name: float((value - expected[name]).abs().max()) for name, value in net.state_dict().items()}
    assert max(moved.values()) <= 1e-6, max(moved, key=moved.get)


# -- autocast ------------------------------------------------------------------------------------------------------


def test_an_autocast_that_decorates_the_forward_is_served():
    """LLFlow's is of a GPU; here it is the CPU's."""
    net, _, _ = accelerated_twins(LL, torch.float32)
    plain, images = copy.deepcopy(net), LL.images(torch.float32)
    ncsr_fast.restore(net)
    net.__class__ = family.HalfLLFlow
    untouched = copy.deepcopy(net)
    report = ncsr_fast.accelerate(net)
    found = seeded(lambda: net(**images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(found, seeded(lambda: plain.__dict__["forward"].__self__.undecorated(**images)), 0.0)
    exact, half = seeded(lambda: plain(**images)), seeded(lambda: untouched(**images))
    assert all(each.dtype == torch.float32 for each in found) and not torch.equal(found[0], exact[0])
    assert relative_error(found[0].detach(), half[0].detach().float()) < 0.02  # its own code rounds the state as well
    assert_served(report)


# -- flows beside another encoder ----------------------------------------------------------------------------------


class OtherEncoder(family.LowLightEncoder):
    """With a part of its own, as those of LLFlow's relatives."""

    def forward(self, x, stacked):
        found = super().forward(x, stacked)
        return {name: each * self.gain if name != "color_map" else each for name, each in found.items()}


def with_another_encoder(dtype: torch.dtype):
    net = LL.build(dtype)
    net.RRDB.__class__ = OtherEncoder
    net.RRDB.gain = torch.nn.Parameter(torch.tensor(0.9, dtype=dtype))
    return net


def test_the_flow_beside_another_encoder():
    net = with_another_encoder(torch.float64)
    untouched = copy.deepcopy(net)
    torch.manual_seed(1)
    drawn = random.getstate(), torch.get_rng_state()
    report = ncsr_fast.accelerate(net)
    assert random.getstate() == drawn[0] and torch.equal(torch.get_rng_state(), drawn[1])
    assert list(report.replaced) == ["flowUpsamplerNet"]
    assert report.left == {"": "parameter RRDB.gain has shape (), expected none: it is unknown"}
    images = LL.images()
    for arguments in ({}, {"add_gt_noise": True}, {"epses": []}):
        results = [seeded(lambda one=one: one(**images, **copy.deepcopy(arguments))) for one in (net, untouched)]
        assert_close(*results, FLOAT64)
    found, expected = gradients(net, images), gradients(untouched, images)
    worst = {name: relative_error(found[name], each) for name, each in expected.items() if each is not None}
    assert max(worst.values()) <= FLOAT64, max(worst, key=worst.get)
    assert_close(net(lr=images["lr"], reverse=True), untouched(lr=images["lr"], reverse=True), FLOAT64)
    assert_served(report)


@pytest.mark.slow
def test_a_flow_with_splits_beside_another_encoder():
    net = CT.build()
    net.RRDB.register_buffer("count", torch.zeros(1))
    untouched = copy.deepcopy(net)
    report = ncsr_fast.accelerate(net)
    assert list(report.replaced) == ["flowUpsamplerNet"]
    images = CT.images()
    z = torch.zeros_like(untouched(**images)[0])
    for arguments in (images, images | {"epses": []}, {"lr": images["lr"], "z": z, "eps_std": 0.7, "reverse": True}):
        results = [seeded(lambda one=one: one(**copy.deepcopy(arguments))) for one in (net, untouched)]
        assert_close(*results, FLOAT64)
    assert_served(report)


@pytest.mark.slow
def test_a_call_of_a_flow_that_is_not_served_runs_its_own_code():
    net = with_another_encoder(torch.float32)
    untouched = copy.deepcopy(net)
    report = ncsr_fast.accelerate(net)
    images = LL.images(torch.float32)
    features = {**untouched.rrdbPreprocessing(images["lr"])}
    features["fea_up0"] = features["fea_up0"].requires_grad_()[..., :1, :1]  # broadcast by nothing
    for one in (net, untouched):
        with pytest.raises(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one.flowUpsamplerNet(gt=images["gt"], rrdbResults=features)
    assert report.handed_over == {"the features fea_up0 has another shape than the network's": 1}


@pytest.mark.slow
def test_of_a_flow_of_other_layers_single_layers_are_replaced():
    net = with_another_encoder(torch.float64)
    net.flowUpsamplerNet.layers[1].flow_permutation = "shuffle"
    untouched = copy.deepcopy(net)
    report = ncsr_fast.accelerate(net)
    assert report.left["flowUpsamplerNet"] == "layers.1.flow_permutation is 'shuffle', and only 'invconv' is served"
    assert "flowUpsamplerNet" not in report.replaced and "flowUpsamplerNet.layers.2.invconv" in report.replaced
    results = [seeded(lambda one=one: one(**LL.images())) for one in (net, untouched)]
    assert_close(*results, FLOAT64)


# -- refusals ------------------------------------------------------------------------------------------------------


class OtherNoise(family.SRFlowNet):
    """Noise as it is in SRFlow, which only a call with noise shows."""

    def noisy(self, gt):
        return family.Network.noisy(self, gt)


class OtherMean(family.LLFlow):
    """A prior whose mean from the HR images is another one."""

    def prior_mean(self, gt, features):
        return super().prior_mean(gt.sqrt(), features)


@pytest.mark.slow
@pytest.mark.parametrize("member, kind", [(DA, OtherNoise), (LL, OtherMean)])
def test_networks_that_compute_something_else_are_not_replaced(member, kind):
    net = member.build()
    net.__class__ = kind
    report = ncsr_fast.accelerate(torch.nn.ModuleList([net, LL.build()]))
    assert report.left["0"] == "it encodes to something else than a network of this structure does"
    assert "0" not in report.replaced and "1" in report.replaced


@pytest.mark.slow
def test_options_of_llflow_that_are_not_served():
    net = LL.build()
    net.opt["avg_color_map"] = True
    report = ncsr_fast.accelerate(net)
    assert report.left == {"": "option avg_color_map = True is not supported, only False"}
    assert list(report.replaced) == ["flowUpsamplerNet"]


def test_a_call_that_is_not_served_warns_once():
    net, untouched, report = accelerated_twins(LL, torch.float32)
    images = LL.images(torch.float32)
    reason = "align_condition_feature is given"
    with pytest.warns(RuntimeWarning, match=f"the accelerated LLFlow runs its own code: {reason}"):
        with pytest.raises(NotImplementedError):
            net(**images, align_condition_feature=True)
    with pytest.raises(NotImplementedError):
        net(**images, align_condition_feature=True)  # warnings are errors here
    assert report.handed_over == {reason: 2}
    with pytest.warns(RuntimeWarning, match="its arguments are others"), pytest.raises(TypeError):
        net(**images, std=images["gt"])
