"""`accelerate` and `restore`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ncsr_fast.compat import layers
from ncsr_fast.compat.flow import FlowForward, compared_flow, describe_flow, recognise_flow, resembles_flow
from ncsr_fast.compat.network import NetworkForward, compared
from ncsr_fast.compat.replacement import Replacement, Unsupported
from ncsr_fast.compat.structure import recognise, resembles_network, skeleton_of
from ncsr_fast.compat.trial import Pair, disagreement
from ncsr_fast.config import FlowConfig, NCSRConfig
from ncsr_fast.engine.options import EngineOptions
from ncsr_fast.model import NCSR


@dataclass(frozen=True)
class AccelerationReport:
    """Report of `accelerate`; `print(report)` prints it in words."""

    replaced: dict[str, str]  # name of the module ("" is the given module) → what it was recognised as
    left: dict[str, str]  # name → why it was left unchanged
    handed_over: Counter[str] = field(default_factory=Counter)  # reason → number of calls so far that ran the module's own code

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)} unchanged"]
        lines += [f"  + {_shown(name)}: {what}" for name, what in self.replaced.items()]
        lines += [f"  - {_shown(name)}: {why}" for name, why in self.left.items()]
        lines += [f"  {count} calls ran the module's own code: {reason}" for reason, count in self.handed_over.items()]
        return "\n".join(lines)


def accelerate(module: nn.Module, **options: Any) -> AccelerationReport:
    """Make published networks of the family, and Glow layers, in `module` run on the engine and the fused operators.

    The change is made in place. Modules and Parameter objects stay the same objects, so that optimizers, `state_dict`,
    checkpoints, hooks of the network and wrappers around it work as before. Calls take and return the same values, equal up to
    rounding, and seeded samples are the same samples.

    A network is recognised by its structure; a copy of it is run once on a small image to verify the formulas of its code. Of a
    network with another encoder (LLFlow's relatives) the flow alone is replaced. If a later call cannot be served (hooks on
    inner modules, attributes or options changed since, unknown arguments, …), the network's own code runs; the first time for
    a reason a RuntimeWarning says so, and `report.handed_over` counts it. (The call that initialises the actnorms is the
    network's own, without a warning.) Several threads may call a network at once, with and without gradients.

    Under `torch.autocast`, around a call or as a decorator of the forward (LLFlow), the small networks and the encoder run at
    autocast's precision. The state stays float32, whereas the published code rounds the state too. Parts of the RRDB encoder
    that only its super-resolved image needs are not evaluated.

    `ncsr_fast.compat.layers` lists the layers. `restore(module)` undoes the change.

    Args:
        module: A network, or a module that contains one: DataParallel, DistributedDataParallel, a module of your own.
        options: Fields of `EngineOptions`, for whole networks: `precision="bf16"` … `checkpoint` is False by default; even then
            the engine saves less for the backward pass than the published network does.

    Returns:
        A report of what was replaced and what was not, and why.

    Raises:
        ValueError: Nothing in `module` could be replaced.
    """
    if EngineOptions(**options).engine != "fused":
        raise ValueError("accelerate always uses the fused engine; restore(module) brings the module's own code back")
    restore(module)
    report = AccelerationReport({}, {})
    _visit(module, "", options, report)
    if not report.replaced:
        reasons = "; ".join(f"{_shown(name)}: {why}" for name, why in report.left.items())
        why = "a model of ncsr_fast runs on the engine already" if isinstance(module, NCSR) else "no part is recognised"
        raise ValueError(f"nothing in this {type(module).__name__} could be accelerated: {reasons or why}")
    return report


def restore(module: nn.Module) -> None:
    """Undo `accelerate`: every module runs its own code again. A module that was not accelerated is not changed."""
    for part in module.modules():
        replacement = Replacement.of(part)
        if replacement is not None:
            replacement.remove()


def _visit(module: nn.Module, name: str, options: dict[str, Any], report: AccelerationReport) -> None:
    """Replace the forward of a module, or of the modules in it."""
    kind = layers.candidate(module)
    passed_over: tuple[str, ...] = ()
    try:
        if "forward" in module.__dict__:
            raise Unsupported("its forward was replaced already")
        if resembles_network(module):
            report.replaced[name] = _replace_network(module, options, report.handed_over)
        elif resembles_flow(module):
            report.replaced[name] = _replace_flow(module, options, report.handed_over)
            passed_over = tuple(key for key, _ in module.named_children())
        elif kind is not None:
            layers.check_layer(kind, module)
            kind(module, report.handed_over).install()
            report.replaced[name], passed_over = kind.described(), kind.passed_over or ()
    except Unsupported as reason:
        report.left[name] = str(reason)
    if resembles_network(module):
        if name in report.left and resembles_flow(module.flowUpsamplerNet):
            _visit(module.flowUpsamplerNet, _joined(name, "flowUpsamplerNet"), options, report)
    else:
        for key, child in module.named_children():
            if key not in passed_over:
                _visit(child, _joined(name, key), options, report)


def _replace_network(net: nn.Module, options: dict[str, Any], handed_over: Counter[str]) -> str:
    config = recognise(net)
    _try_and_install(NetworkForward, compared, net, config, options, handed_over)
    return skeleton_of(config).describe()


def _replace_flow(flow: nn.Module, options: dict[str, Any], handed_over: Counter[str]) -> str:
    config = recognise_flow(flow)
    _try_and_install(FlowForward, compared_flow, flow, config, options, handed_over)
    return describe_flow(config)


def _try_and_install(
    forward: Callable[..., Replacement],
    compare: Callable[..., Iterator[Pair]],
    module: nn.Module,
    config: NCSRConfig | FlowConfig,
    options: dict[str, Any],
    handed_over: Counter[str],
) -> None:
    """Install a replacement that agrees with the module on a small image, in float32; raise Unsupported for another."""
    exact = {**options, "precision": "fp32"}
    found = disagreement(module, lambda trial: forward(trial, config, exact), partial(compare, config))
    if found is not None:
        raise Unsupported(found)
    forward(module, config, options, handed_over).install()


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _shown(name: str) -> str:
    return name or "the module itself"
