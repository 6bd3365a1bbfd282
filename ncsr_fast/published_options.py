"""Published YAMLs, as the dict a YAML reader returns: which system one is of, and the architecture it describes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ncsr_fast.systems import SYSTEMS, System

_DEEP = {system.title: name for name, system in SYSTEMS.items() if system.title.startswith("SRFlow-DA")}
_DEEP_CONDITION = 320  # channels of u in SRFlow-DA's program, whatever nf says
# by network_G.which_model_G, those that are served
_SERVED = {"NCSRNet": "NCSR and FS-NCSR", "SRFlowNet": "SRFlow, SRFlow-DA and CTFlow", "LLFlow": "LLFlow"}
# relatives that are not, by how their names begin, with the served one whose steps are most alike
_RELATIVES = {
    "hcflow": "SRFlowNet",
    "deflow": "SRFlowNet",
    "dehazeflow": "SRFlowNet",
    "glare": "LLFlow",
    "retinexflow": "LLFlow",
    "skf": "LLFlow",
}


def architecture(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the `NCSRConfig` that a published YAML describes.

    Raises:
        ValueError: A key asks for what is not served, and is named; or the system is not served, and the nearest is named.
    """
    network = _section(options, "network_G")
    flow = _section(network, "flow", "network_G.flow")
    name = described_system(options)
    system, scale = SYSTEMS[name], options.get("scale", network.get("upscale"))
    if scale is None:
        raise ValueError("the options have no 'scale'")
    if scale not in system.scales:
        raise ValueError(f"scale must be {' or '.join(map(str, system.scales))} for {system.title}, not {scale!r}")
    stacked, coupling = flow.get("stackRRDB") or {}, flow.get("CondAffineSeparatedAndCond") or {}
    fields = {
        "system": name,
        "scale": scale,
        "channels": network.get("nf", 64),
        "growth": network.get("gc", 32),
        "blocks": network.get("nb", 23),
        "stacked_blocks": tuple(stacked.get("blocks") or ()),
        "steps": flow.get("K", 16),
        "transition_steps": int(flow.get("additionalFlowNoAffine", 0)),
        "hidden_channels": coupling.get("hidden_channels") or 64,
        "eps": coupling.get("eps", 1e-4),
    }
    if network["which_model_G"] == "NCSRNet":
        conditioned = options.get("mode", "softflow") == "softflow"  # otherwise the program passes no noise
        fields["noise_channels"] = flow.get("std_channels", 3)
        fields["noise_steps"] = tuple(flow.get("S") or ()) if conditioned else ()
    _check_levels(network["which_model_G"], system, scale, flow.get("L"))
    condition = fields["channels"] * (1 + len(fields["stacked_blocks"]))
    for key, value, supported in _requirements(options, network, flow, system, condition):
        if value != supported:
            raise ValueError(f"{key} = {value!r} is not supported, only {supported!r}")
    return fields


def _check_levels(kind: str, system: System, scale: int, given: Any) -> None:
    levels = system.levels(scale)
    if given not in (None, levels):
        is_srflow = kind == "SRFlowNet" and system is SYSTEMS["ncsr"]
        hint = f"; SRFlow-DA is told from it by 'model', one of {', '.join(_DEEP)}" if is_srflow else ""
        title = "SRFlow" if is_srflow else system.title
        raise ValueError(f"network_G.flow.L = {given} is not supported: {title} has {levels} levels at scale {scale}{hint}")


def described_system(options: Mapping[str, Any]) -> str:
    """The name in `SYSTEMS` of the system that a published YAML is of.

    Raises:
        ValueError: It is of none that is served; the message names it and the nearest that is.
    """
    network = _section(options, "network_G")
    kind, model = network.get("which_model_G"), options.get("model")
    if kind == "LLFlow":
        return "llflow"
    if kind == "NCSRNet":
        return "fs-ncsr" if options.get("divide_freq") else "ncsr"
    if kind == "SRFlowNet":
        if model in _DEEP:
            return _DEEP[model]
        if str(model).startswith("SRFlow-DA"):
            raise ValueError(f"model = {model!r} is not served; the nearest that is: {_nearest(model, _DEEP)!r}")
        return "ctflow" if options.get("scale", network.get("upscale")) == 1 else "ncsr"
    if str(kind).startswith(("RRDB", "ESRGAN")):
        raise ValueError(
            f"network_G.which_model_G = {kind!r} is no flow but a generator, which RRDB.from_pretrained reads from its weights "
            f"alone; flows are {_listed()}"
        )
    relative = next((nearest for start, nearest in _RELATIVES.items() if str(kind).lower().startswith(start)), None)
    nearest = relative or _nearest(str(kind), _SERVED)
    raise ValueError(
        f"network_G.which_model_G = {kind!r} is not served; the nearest that is: {nearest!r}, of {_SERVED[nearest]}"
        f" (all: {_listed()})"
    )


def _requirements(
    options: Mapping[str, Any], network: Mapping[str, Any], flow: Mapping[str, Any], system: System, condition: int
) -> Iterator[tuple[str, Any, Any]]:
    """Keys with their values and those that are supported, `condition` being the number of channels of u."""
    images = system.channels
    yield "network_G.in_nc", network.get("in_nc", images), images
    yield "network_G.out_nc", network.get("out_nc", images), images
    stacked, split = flow.get("stackRRDB") or {}, flow.get("split") or {}
    is_split = system.unsplit_levels < 3
    yield "network_G.flow.coupling", flow.get("coupling"), "CondAffineSeparatedAndCond"
    yield "network_G.flow.flow_permutation", flow.get("flow_permutation", "invconv"), "invconv"
    yield "network_G.flow.fea_up0", flow.get("fea_up0"), True
    yield "network_G.flow.stackRRDB.concat", stacked.get("concat"), True
    yield "network_G.flow.norm", flow.get("norm"), None
    yield "network_G.flow.split.enable", split.get("enable"), is_split
    if is_split:
        yield "network_G.flow.split.conditional", bool(split.get("conditional")), False
        yield "network_G.flow.split.consume_ratio", split.get("consume_ratio") or 0.5, 0.5
        yield "network_G.flow.split.logs_eps", split.get("logs_eps") or 0, 0
    if system.title in _DEEP:
        yield "network_G.nf · (1 + stacked blocks)", condition, _DEEP_CONDITION
    elif is_split:
        yield "network_G.flow.split.correct_splits", bool(split.get("correct_splits")), system.unsplit_levels == 1
    if system.encoder == "low light":
        yield "network_G.flow.conditionInFeaDim", flow.get("conditionInFeaDim", 320), condition
        yield from _low_light_requirements(options)


def _low_light_requirements(options: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The same for LLFlow's keys at the top level and of its training set, where they are given."""
    yield "cond_encoder", options.get("cond_encoder"), "ConEncoder1"
    yield "concat_histeq", options.get("concat_histeq"), True
    for key in (
        "avg_color_map",
        "histeq_as_input",
        "concat_color_map",
        "gray_map",
        "align_condition_feature",
        "to_yuv",
        "encode_color_map",
        "le_curve",
        "sigmoid_output",
        "optimize_all_z",
    ):
        yield key, bool(options.get(key)), False
    train = (options.get("datasets") or {}).get("train") or {}
    yield "datasets.train.log_low", train.get("log_low", True), True
    yield "datasets.train.gamma_aug", bool(train.get("gamma_aug")), False


def _nearest(name: str, served: Mapping[str, str]) -> str:
    return difflib.get_close_matches(name, served, 1, cutoff=0)[0]


def _listed() -> str:
    return ", ".join(f"{kind!r} ({systems})" for kind, systems in _SERVED.items())


def _section(options: Mapping[str, Any], key: str, label: str | None = None) -> Mapping[str, Any]:
    section = options.get(key)
    if not isinstance(section, Mapping):
        raise ValueError(f"the options have no section {label or key!r}")
    return section
