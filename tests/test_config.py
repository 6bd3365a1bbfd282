"""NCSRConfig: presets, validation, and published option files."""

from __future__ import annotations

import copy

import pytest

from ncsr_fast import NCSRConfig
from ncsr_fast.config import PRESETS

# the architecture part of NCSR's 4X.yml, as a YAML reader returns it
PUBLISHED = {
    "scale": 4,
    "mode": "softflow",
    "network_G": {
        "which_model_G": "NCSRNet", "in_nc": 3, "out_nc": 3, "nf": 64, "nb": 23, "upscale": 4,
        "flow": {
            "K": 16, "L": 3, "S": [0, 16, 16], "noInitialInj": True, "std_channels": 3,
            "coupling": "CondAffineSeparatedAndCond", "additionalFlowNoAffine": 2, "split": {"enable": True}, "fea_up0": True,
            "stackRRDB": {"blocks": [1, 8, 15, 22], "concat": True},
        },
    },
}  # fmt: skip


def published(**flow) -> dict:
    options = copy.deepcopy(PUBLISHED)
    options["network_G"]["flow"].update(flow)
    return options


def test_published_options_are_the_preset():
    assert NCSRConfig.from_published(PUBLISHED) == NCSRConfig.preset("ncsr-x4")
    x8 = published(K=20, L=4, S=[0, 0, 16, 16])
    x8["scale"] = 8
    assert NCSRConfig.from_published(x8) == NCSRConfig.preset("ncsr-x8")


def test_published_srflow_options():
    options = published()
    options["network_G"]["which_model_G"] = "SRFlowNet"
    assert NCSRConfig.from_published(options) == NCSRConfig.preset("srflow-x4")


def test_published_options_without_noise_have_no_active_layer():
    options = published() | {"mode": "plain"}
    config = NCSRConfig.from_published(options)
    assert config.noise_channels == 3 and config.noise_steps == (0, 0, 0)


@pytest.mark.parametrize(
    "flow, message",
    [
        ({"coupling": "condAffine"}, "network_G.flow.coupling = 'condAffine' is not supported"),
        ({"L": 4}, "network_G.flow.L = 4 is not supported: NCSR has 3 levels at scale 4"),
        ({"split": {"enable": False}}, "network_G.flow.split.enable = False"),
        ({"stackRRDB": {"blocks": [1], "concat": False}}, "network_G.flow.stackRRDB.concat"),
        ({"norm": {"type": "x"}}, "network_G.flow.norm"),
        ({"std_channels": 2}, "noise_channels must be 0"),
    ],
)
def test_unsupported_published_options_are_named(flow, message):
    with pytest.raises(ValueError, match=message):
        NCSRConfig.from_published(published(**flow))


def test_published_options_that_are_none():
    with pytest.raises(ValueError, match="no section 'network_G'"):
        NCSRConfig.from_published({"scale": 4})
    with pytest.raises(ValueError, match="which_model_G = 'RRDBNet' is no flow but a generator, which RRDB.from_pretrained"):
        NCSRConfig.from_published({"network_G": {"which_model_G": "RRDBNet", "flow": {}}})


@pytest.mark.parametrize("name", PRESETS)
def test_dict_round_trip(name):
    config = NCSRConfig.preset(name)
    assert NCSRConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(NCSRConfig.preset(name))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"scale": 3}, "scale must be 4 or 8, not 3"),
        ({"steps": 0}, "steps must be a positive integer, not 0"),
        ({"noise_channels": 2}, "noise_channels must be 0"),
        ({"noise_steps": (0, 1, 1)}, "needs noise_channels 1 or 3"),
        ({"noise_channels": 3, "noise_steps": (1, 1)}, "one entry for each of the 3 levels"),
        ({"blocks": 4}, "stacked_blocks must be distinct block indices below blocks=4"),
        ({"transition_steps": -1}, "transition_steps must be an integer ≥ 0"),
    ],
)
def test_invalid_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        NCSRConfig(**values)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown configuration key 'depth'"):
        NCSRConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match="no preset 'ncsr-x2'; there are ncsr-x4"):
        NCSRConfig.preset("ncsr-x2")


def test_channels_of_the_levels():
    assert NCSRConfig.preset("ncsr-x4").level_channels() == [12, 24, 96]
    assert NCSRConfig.preset("ncsr-x8").level_channels() == [12, 24, 48, 192]
    assert NCSRConfig.preset("ncsr-x4").condition_channels == 320
