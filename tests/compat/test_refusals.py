"""What the engine does not serve is refused with a reason, or runs the network's own code and is counted."""

from __future__ import annotations

import copy

import pytest
import torch
from compat.networks import SMALL, STAND_INS, accelerated_twins
from compat.standin import Split, StandInNCSR
from compat.test_network import replicate
from operator_cases import marked
from support import image, tiny_model

import ncsr_fast

SRFLOW = STAND_INS[-1]
pytestmark = pytest.mark.filterwarnings("ignore:the accelerated:RuntimeWarning")  # tests/compat/test_family.py tests those


def changed_options(**changes):
    net = SMALL.build()
    net.opt = copy.deepcopy(net.opt)
    net.opt["network_G"]["flow"] |= changes
    return net


def with_layer_attribute(index, path, attribute, value):
    net = SMALL.build()
    setattr(net.flowUpsamplerNet.layers[index].get_submodule(path), attribute, value)
    return net


class OtherFormula(StandInNCSR):
    """Looks like the others; its splits do not."""

    def encode(self, *arguments):
        z, nll, logdet = super().encode(*arguments)
        return z, nll * 1.01, logdet


class OtherInverse(StandInNCSR):
    def decode(self, *arguments):
        image, logdet = super().decode(*arguments)
        return image.clamp(0.2, 0.8), logdet


class OtherSignature(StandInNCSR):
    def forward(self, gt=None, lr=None, labels=None, reverse=False):
        raise NotImplementedError


def of_class(kind):
    net = SMALL.build()
    net.__class__ = kind
    return net


def with_hook():
    net = SMALL.build()
    net.RRDB.conv_first.register_forward_hook(lambda *arguments: None)
    return net


def with_buffer():
    net = SMALL.build()
    net.register_buffer("count", torch.zeros(1))
    return net


def with_parameter():
    net = SMALL.build()
    net.flowUpsamplerNet.extra = torch.nn.Conv2d(3, 3, 1)
    return net


def with_noise_in_the_first_steps():
    net = SMALL.build()
    net.flowUpsamplerNet.layers[3].affine.stdmode, net.flowUpsamplerNet.layers[4].affine.stdmode = True, False
    return net


def without_options():
    net = SMALL.build()
    net.opt = None
    return net


def with_other_options_of_the_encoder():
    net = SMALL.build()
    net.RRDB.opt = SRFLOW.options
    return net


def patched():
    net = SMALL.build()
    net.forward = lambda *arguments, **options: None
    return net


REFUSED = {
    "condition of a split": (lambda: changed_options(split={"enable": True, "conditional": True}), "split.conditional = True"),
    "coupling": (lambda: changed_options(coupling="CondAffine"), "flow.coupling = 'CondAffine' is not supported"),
    "steps": (lambda: changed_options(K=3), "expected .* it is unknown|it is missing"),
    "eps": (lambda: with_layer_attribute(3, "affine", "affine_eps", 1e-3), "affine_eps is 0.001, and only 0.0001"),
    "padding": (lambda: with_layer_attribute(3, "affine.fAffine.0", "padding", (0, 0)), r"padding is \(0, 0\)"),
    "factor": (lambda: with_layer_attribute(3, "affine.fAffine.4", "logscale_factor", 1), "logscale_factor is 1"),
    "permutation": (lambda: with_layer_attribute(3, "", "flow_permutation", "shuffle"), "'shuffle', and only 'invconv'"),
    "likelihood": (lambda: of_class(OtherFormula), "it encodes to something else"),
    "inverse": (lambda: of_class(OtherInverse), "it decodes to something else"),
    "signature": (lambda: of_class(OtherSignature), r"its forward takes \(gt, lr, labels, reverse\)"),
    "hook": (with_hook, "RRDB.conv_first has hooks, which would not run"),
    "buffer": (with_buffer, "it has buffers"),
    "parameter": (with_parameter, "flowUpsamplerNet.extra.weight has shape .*, expected none: it is unknown"),
    "first steps": (with_noise_in_the_first_steps, "in level 1 the steps with a noise coupling are not the last"),
    "options": (without_options, "it has no options `opt`"),
    "options of the encoder": (with_other_options_of_the_encoder, "RRDB.opt are not those of the network"),
    "patched": (patched, "its forward was replaced already"),
    "meta": (lambda: SMALL.build().to("meta"), "on meta"),
    "something else": (lambda: torch.nn.Linear(2, 2), "nothing in this Linear could be accelerated: no part is recognised"),
    "own": (tiny_model, "nothing in this NCSR could be accelerated: a model of ncsr_fast runs on the engine already"),
}


@marked("slow", lambda what: what not in ("coupling", "eps", "hook", "likelihood", "something else", "own"))
@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_reason(what):
    build, reason = REFUSED[what]
    net = build()
    attributes = set(net.__dict__)
    with pytest.raises(ValueError, match=reason):
        ncsr_fast.accelerate(net)
    assert set(net.__dict__) == attributes


def test_refused_options():
    with pytest.raises(ValueError, match="restore.module. brings"):
        ncsr_fast.accelerate(SMALL.build(), engine="plain")
    with pytest.raises(TypeError, match="unexpected keyword"):
        ncsr_fast.accelerate(SMALL.build(), speed="high")


@pytest.mark.slow
def test_a_refused_network_beside_a_served_one_is_in_the_report():
    report = ncsr_fast.accelerate(torch.nn.ModuleList([SMALL.build(), of_class(OtherFormula)]))
    assert list(report.replaced) == ["0"] and list(report.left) == ["1"]
    assert "  - 1: it encodes to something else" in str(report)


def exchange_a_module(net):
    net.RRDB.conv_first = copy.deepcopy(net.RRDB.conv_first)


def add_a_hook(net):
    net.flowUpsamplerNet.layers[3].invconv.register_forward_pre_hook(lambda *arguments: None)


def switch_a_noise_coupling(net):
    net.flowUpsamplerNet.layers[3].affine.stdmode = True


def change_an_attribute(net):
    net.flowUpsamplerNet.layers[3].affine.affine_eps = 1e-2


def add_a_module(net):
    net.RRDB.RRDB_trunk.append(torch.nn.Identity())


def replace_a_forward(net):
    net.RRDB.conv_first.forward = lambda x: torch.zeros(len(x), 4, *x.shape[2:], dtype=x.dtype)


def change_the_padding_mode(net):
    net.RRDB.conv_first.padding_mode = "reflect"
    net.RRDB.conv_first._reversed_padding_repeated_twice = [1] * 4


def dilate(net):
    conv = net.RRDB.RRDB_trunk[1].RDB2.conv3
    conv.dilation, conv.padding = (2, 2), (2, 2)


def pad_a_flow_network_otherwise(net):
    conv = net.flowUpsamplerNet.layers[3].affine.fFeatures[0]
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1] * 4


def change_a_slope(net):
    net.RRDB.lrelu.negative_slope = 0.5


def change_a_slope_of_a_block(net):
    net.RRDB.RRDB_trunk[0].RDB1.lrelu.negative_slope = 0.5


def compute_in_place(net):
    net.RRDB.lrelu.inplace = True


def stack_other_blocks(net):
    net.opt["network_G"]["flow"]["stackRRDB"]["blocks"] = [1, 0, 2, 3]


def ask_for_another_coupling(net):
    net.opt["network_G"]["flow"]["coupling"] = "CondAffine"


def give_the_encoder_other_options(net):
    net.RRDB.opt = copy.deepcopy(net.opt)
    net.RRDB.opt["network_G"]["flow"]["stackRRDB"]["blocks"] = [1, 0, 2, 3]


def replace_the_options(net):
    net.opt = copy.deepcopy(net.opt)
    stack_other_blocks(net)


CHANGED = {
    "RRDB.conv_first.padding_mode is 'reflect', and only 'zeros' is served": change_the_padding_mode,
    "RRDB.RRDB_trunk.1.RDB2.conv3.padding is (2, 2), and only (1, 1) is served": dilate,
    "flowUpsamplerNet.layers.3.affine.fFeatures.0.padding_mode is 'circular', and only 'zeros' is served": (
        pad_a_flow_network_otherwise
    ),
    "RRDB.lrelu.negative_slope is 0.5, and only 0.2 is served": change_a_slope,
    "RRDB.RRDB_trunk.0.RDB1.lrelu.negative_slope is 0.5, and only 0.2 is served": change_a_slope_of_a_block,
    "RRDB.lrelu.inplace is True, and only False is served": compute_in_place,
    "its options `opt` have changed since it was recognised": stack_other_blocks,
    "option network_G.flow.coupling = 'CondAffine' is not supported, only 'CondAffineSeparatedAndCond'": (
        ask_for_another_coupling
    ),
    "the options RRDB.opt are not those of the network": give_the_encoder_other_options,
    "RRDB.conv_first was exchanged for another module": exchange_a_module,
    "flowUpsamplerNet.layers.3.invconv has hooks, which would not run": add_a_hook,
    "flowUpsamplerNet.layers.3.affine.affine_eps is 0.01, and only 0.0001 is served": change_an_attribute,
    "flowUpsamplerNet.layers.3.affine.stdmode is True, and only False is served": switch_a_noise_coupling,
    "submodules were added or removed": add_a_module,
    "the forward of RRDB.conv_first was replaced": replace_a_forward,
}


@marked("slow", lambda reason: CHANGED[reason] not in (add_a_hook, change_an_attribute, change_a_slope, stack_other_blocks))
@pytest.mark.parametrize("reason", CHANGED)
def test_networks_changed_afterwards_run_their_own_code(reason):
    net, untouched, report = accelerated_twins(SMALL)
    net(**SMALL.images())
    for one in (net, untouched):
        CHANGED[reason](one)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(net(**SMALL.images()), untouched(**SMALL.images())))
    assert report.handed_over == {reason: 1}


@marked("slow", lambda change: change is not change_a_slope_of_a_block)
@pytest.mark.parametrize("change", [change_the_padding_mode, change_a_slope_of_a_block, compute_in_place, replace_the_options])
def test_replicas_of_a_network_changed_afterwards_run_its_own_code(change):
    """What is served is that of the network as it was recognised, not of the replica as it was made."""
    net, untouched, report = accelerated_twins(SMALL)
    for one in (net, untouched):
        change(one)
    replica = replicate(net)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(replica(**SMALL.images()), untouched(**SMALL.images())))
    assert sum(report.handed_over.values()) == 1


@pytest.mark.slow
def test_calls_that_are_not_served_run_the_networks_own_code():
    net, untouched, report = accelerated_twins(SMALL)
    images = SMALL.images()
    odd = {"lr": image(1, 3, 8, 9), "gt": image(1, 3, 32, 36), "std": image(1, 3, 32, 36)}
    z = image(2, 96, 4, 5)
    calls = {
        "y_label is given": images | {"y_label": 1},
        "epses has 1 latents instead of 2": dict(lr=images["lr"], epses=[z], reverse=True, std=images["std"]),
        "there is no LR image whose sides are multiples of 2": odd,
        "lr has another dtype or device than the parameters": images | {"lr": images["lr"].float()},
        "gt has another shape than the network's": images | {"gt": images["gt"][:, :, :-4]},
        "z has another shape than the network's": dict(lr=images["lr"], z=z[:1], eps_std=0.5, reverse=True),
        "std is neither a noise image nor one number for each image": images | {"std": images["std"][:, :2]},
        "lr is not an ordinary tensor": {"gt": images["gt"]},
        "a feature map of lr_enc is not an ordinary tensor": images | {"lr_enc": {}},
    }
    for reason, arguments in calls.items():
        found, expected = outcome(net, arguments), outcome(untouched, arguments)
        assert type(found) is type(expected), reason
        if isinstance(expected, tuple):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))
        else:
            assert str(found) == str(expected)
        assert report.handed_over[reason] == 1, report.handed_over
    outcome(net, {"unknown": 1})
    assert sum(report.handed_over.values()) == len(calls) + 1


def outcome(net, arguments):
    """What a call returns, or the error it raises."""
    torch.manual_seed(0)
    try:
        return net(**copy.deepcopy(arguments))
    except Exception as error:
        return error


@pytest.mark.slow
def test_a_network_without_a_noise_condition_is_given_none():
    net, untouched, report = accelerated_twins(SRFLOW)
    arguments = SRFLOW.images() | {"std": SRFLOW.images()["gt"]}
    assert isinstance(outcome(net, arguments), TypeError) and isinstance(outcome(untouched, arguments), TypeError)
    assert sum(report.handed_over.values()) == 1


@pytest.mark.slow
def test_contexts_in_which_the_own_code_runs():
    net, untouched, report = accelerated_twins(SMALL, torch.float32, step=0.003)
    images = SMALL.images(torch.float32)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    net(**images)
    hook.remove()
    traced = torch.compile(net, backend="eager")
    assert torch.equal(traced(**images)[1], untouched(**images)[1])
    assert "there are global module hooks, which would not run" in report.handed_over
    calls = net.calls
    net(**images)
    assert net.calls == calls


def test_half_precision_parameters_run_the_networks_own_code():
    net, _, report = accelerated_twins(SMALL, torch.float32, step=0.003)
    net.bfloat16()
    outcome(net, SMALL.images(torch.bfloat16))
    assert report.handed_over == {"its parameters are torch.bfloat16 on cpu": 1}


def test_splits_of_another_kind():
    net = SMALL.build()
    next(layer for layer in net.flowUpsamplerNet.layers if isinstance(layer, Split)).logs_eps = 0.1
    with pytest.raises(ValueError, match="logs_eps is 0.1, and only 0 is served"):
        ncsr_fast.accelerate(net)
