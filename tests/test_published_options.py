"""Published YAMLs of the family: presets are what they describe, and what is not served is named."""

from __future__ import annotations

import copy

import pytest

import ncsr_fast
from ncsr_fast import NCSRConfig
from ncsr_fast.systems import PRESETS, SYSTEMS

FLOW = {"coupling": "CondAffineSeparatedAndCond", "additionalFlowNoAffine": 2, "noInitialInj": True, "fea_up0": True}


def options(model: str, kind: str, scale: int, blocks: int, stacked: list[int], flow: dict, **top) -> dict:
    """What a reader returns of a YAML that is all but its part on data and training."""
    network = {"which_model_G": kind, "in_nc": 3, "out_nc": 3, "nf": 64, "nb": blocks, "upscale": scale}
    stack = {"stackRRDB": {"blocks": stacked, "concat": True}, "split": {"enable": True}}
    return {"model": model, "scale": scale, **top, "network_G": {**network, "flow": {**FLOW, **stack, **flow}}}


def deep(model: str, scale: int, steps: int, levels: int) -> dict:
    return options(model, "SRFlowNet", scale, 23, [1, 8, 15, 22], {"K": steps, "L": levels})


def noisy(scale: int, steps: int, noise_steps: list[int], **top) -> dict:
    flow = {"K": steps, "L": len(noise_steps), "S": noise_steps, "std_channels": 3}
    return options("NCSR", "NCSRNet", scale, 23, [1, 8, 15, 22], flow, mode="softflow", **top)


def low_light(width: int, blocks: int, stacked: list[int], flow: dict) -> dict:
    switches = {"cond_encoder": "ConEncoder1", "concat_histeq": True, "to_yuv": False, "avg_color_map": False}
    data = {"datasets": {"train": {"log_low": True, "gamma_aug": False}}, "train_gt_ratio": 0.2}
    made = options("LLFlow", "LLFlow", 1, blocks, stacked, {"L": 3, "split": {"enable": False}, **flow}, **switches, **data)
    made["network_G"]["nf"] = width
    return made


def ct() -> dict:
    flow = {"K": 16, "L": 3, "split": {"enable": True, "correct_splits": True}, "fea_up-1": True, "fea_up-2": True}
    made = options("SRFlow", "SRFlowNet", 1, 14, [1, 5, 9, 13], flow)
    made["network_G"].update(in_nc=1, out_nc=1)
    return made


PUBLISHED = {
    "fs-ncsr-x4": noisy(4, 16, [0, 16, 16], divide_freq=True, std=0.05),
    "fs-ncsr-x8": noisy(8, 20, [0, 0, 16, 16], divide_freq=True, std=0.03),
    "srflow-da-x4": deep("SRFlow-DA", 4, 6, 2),
    "srflow-da-x8": deep("SRFlow-DA", 8, 6, 3),
    "srflow-da-r-x4": deep("SRFlow-DA-R", 4, 6, 2),
    "srflow-da-r-x8": deep("SRFlow-DA-R", 8, 6, 3),
    "srflow-da-d-x4": deep("SRFlow-DA-D", 4, 1, 2),
    "srflow-da-d-x8": deep("SRFlow-DA-D", 8, 1, 3),
    "srflow-da-s-x4": deep("SRFlow-DA-S", 4, 12, 1),
    "srflow-da-s-x8": deep("SRFlow-DA-S", 8, 18, 1),
    "ctflow": ct(),
    "llflow-lol": low_light(64, 24, [1, 3, 5, 7], {"K": 12}),
    "llflow-lol-smallnet": low_light(32, 4, [1], {"K": 4, "conditionInFeaDim": 64}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_options_are_the_preset(name):
    assert NCSRConfig.from_published(PUBLISHED[name]) == NCSRConfig.preset(name)


def test_every_system_has_presets():
    assert {NCSRConfig.preset(name).system for name in PRESETS} == set(SYSTEMS)


def test_levels_of_the_one_level_variant():
    """Splits behind steps 0, 6, 12 …, of one squeeze by the scale."""
    for name, steps, channels in (
        ("srflow-da-s-x4", [1, 6, 5], [48, 24, 12]),
        ("srflow-da-s-x8", [1, 6, 6, 5], [192, 96, 48, 24]),
    ):
        flow = NCSRConfig.preset(name).flow
        assert [level.steps for level in flow.levels] == steps and flow.level_channels() == channels
        assert [level.transition_steps for level in flow.levels] == [2] + [0] * (len(steps) - 1)
        assert flow.level_scales() == (1,) * len(steps)


def changed(name: str, *path: str, value: object) -> dict:
    made = copy.deepcopy(PUBLISHED[name])
    inside = made
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return made


KIND = ("network_G", "which_model_G")


@pytest.mark.parametrize(
    "given, message",
    [
        (
            changed("ctflow", *KIND, value="HCFlowNet_SR"),
            "'HCFlowNet_SR' is not served; the nearest that is: 'SRFlowNet', of SRFlow",
        ),
        (
            changed("llflow-lol", *KIND, value="GLAREFlow"),
            "'GLAREFlow' is not served; the nearest that is: 'LLFlow', of LLFlow",
        ),
        (changed("llflow-lol", *KIND, value="LLFlowX"), "the nearest that is: 'LLFlow', of LLFlow"),
        (changed("llflow-lol", *KIND, value=None), "which_model_G = None is not served; the nearest"),
        (
            changed("srflow-da-x4", "model", value="SRFlow-DA-X"),
            "model = 'SRFlow-DA-X' is not served; the nearest that is: 'SRFlow-DA",
        ),
        (
            changed("srflow-da-x4", "model", value="SRFlow"),
            "SRFlow has 3 levels at scale 4; SRFlow-DA is told from it by 'model'",
        ),
        (
            changed("srflow-da-x4", "network_G", "nf", value=32),
            r"nf · \(1 \+ stacked blocks\) = 160 is not supported, only 320",
        ),
        (
            changed("srflow-da-s-x4", "network_G", "flow", "K", value=13),
            "steps must not be 13: SRFlow-DA-S splits after steps 0, 6",
        ),
        (changed("llflow-lol", "cond_encoder", value="NAFNet"), "cond_encoder = 'NAFNet' is not supported, only 'ConEncoder1'"),
        (changed("llflow-lol", "to_yuv", value=True), "to_yuv = True is not supported, only False"),
        (changed("llflow-lol", "datasets", value={"train": {"log_low": False}}), "datasets.train.log_low = False"),
        # its program's default
        (low_light(32, 4, [1], {"K": 4}), "conditionInFeaDim = 320 is not supported, only 64"),
        (changed("llflow-lol", "scale", value=2), "scale must be 1 for LLFlow, not 2"),
        (changed("llflow-lol-smallnet", "network_G", "flow", "conditionInFeaDim", value=320), "conditionInFeaDim = 320 is not"),
        (
            changed("ctflow", "network_G", "flow", "split", value={"enable": True}),
            "split.correct_splits = False is not supported",
        ),
        (changed("ctflow", "network_G", "in_nc", value=3), "network_G.in_nc = 3 is not supported, only 1"),
        (changed("fs-ncsr-x4", "scale", value=2), "scale must be 4 or 8 for FS-NCSR, not 2"),
    ],
)
def test_what_is_not_served_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        ncsr_fast.from_published(given)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"system": "hcflow"}, "system must be one of 'ncsr', 'fs-ncsr'"),
        ({"system": "llflow"}, "scale must be 1, not 4"),
        ({"system": "srflow-da", "noise_channels": 3}, "noise_channels must be 0: SRFlow-DA has no noise-conditional layer"),
        ({"system": "srflow-da-s", "steps": 7}, "steps must not be 7"),
    ],
)
def test_impossible_architectures(values, message):
    with pytest.raises(ValueError, match=message):
        NCSRConfig(**values)
