"""Members of the family beside their published programs: ten images, and a training step.

    python -m ncsr_fast.benchmarks.family --published fs-ncsr-x4=CHECKOUT srflow-da-x4=CHECKOUT llflow-lol=CHECKOUT

Three arms take turns in one process: the published network, the same with `accelerate`, and our model. That they compute
the same is checked first. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ncsr_fast import NCSR, NCSRConfig, accelerate
from ncsr_fast.cli._common import Gathered, thread_count
from ncsr_fast.config import PRESETS
from ncsr_fast.files import atomic_write

from .arms import ACCELERATED, OURS, PUBLISHED, backward, random_model
from .harness import brief, quantiles, rounded, side_by_side
from .provenance import provenance, recorded_command
from .published import NOT_NEEDED
from .report import to_json

STORED = "family-cpu.json"
IMAGES = 10
ALLOWED = 2e-4  # of images and losses, relative to the largest element: random weights through some tens of steps in float32
_NETWORKS = {"ncsr": "NCSRNet", "fs-ncsr": "NCSRNet", "llflow": "LLFlow"}  # others are SRFlowNet
_SIDES = {4: 40, 8: 20, 1: 160}  # of LR, by scale: those of the published training


class PublishedOptions(dict):
    """Options as the published programs read them: what is missing is None."""

    def __missing__(self, key: str) -> None:
        return None


def published_options(config: NCSRConfig) -> PublishedOptions:
    """The part of a published YAML that decides an architecture."""
    traits, low_light = config.traits, config.traits.encoder == "low light"
    flow = {
        "K": config.steps,
        "L": traits.levels(config.scale),
        "coupling": "CondAffineSeparatedAndCond",
        "additionalFlowNoAffine": config.transition_steps,
        "fea_up0": True,
        "split": PublishedOptions(enable=not low_light, correct_splits=traits.scales == (1,)),
        "stackRRDB": PublishedOptions(blocks=list(config.stacked_blocks), concat=True),
        "conditionInFeaDim": config.condition_channels,
    }
    if config.noise_channels:
        flow |= {"S": list(config.noise_steps), "std_channels": config.noise_channels}
    if traits.smaller_levels > 1:
        flow |= {"fea_up-1": True, "fea_up-2": True}
    network = {"which_model_G": _NETWORKS.get(config.system, "SRFlowNet"), "in_nc": traits.channels, "out_nc": traits.channels}
    network |= {"nf": config.channels, "nb": config.blocks, "flow": PublishedOptions(flow)}
    found = {"scale": config.scale, "mode": "softflow", "model": traits.title, "network_G": PublishedOptions(network)}
    if low_light:  # ratio 0: the prior's mean is always the condition's
        found |= {"cond_encoder": "ConEncoder1", "concat_histeq": True, "train_gt_ratio": 0.0, "align_maxpool": True}
    train = PublishedOptions(quant=32, GT_size=config.scale * _SIDES[config.scale])
    return PublishedOptions(found, datasets=PublishedOptions(train=train))


def published_network(checkout: Path, config: NCSRConfig) -> nn.Module:
    """The network of a checkout, whose modules are forgotten again: those of the programs have the same names."""
    found = sorted(checkout.glob("**/models/modules"))
    if not found:
        raise ValueError(f"{str(checkout)!r} has no folder models/modules, which the published programs have")
    options, known = published_options(config), set(sys.modules)
    name = options["network_G"]["which_model_G"]
    absent = {module: mock.MagicMock() for module in NOT_NEEDED if module not in sys.modules}
    with mock.patch.dict(sys.modules, absent), mock.patch.object(sys, "path", [str(found[0].parents[1]), *sys.path]):
        kind = getattr(importlib.import_module(f"models.modules.{name}_arch"), name)
        network = kind(
            config.traits.channels, config.traits.channels, config.channels, config.blocks, gc=config.growth,
            scale=config.scale, K=config.steps, opt=options,
        )  # fmt: skip
        for module in set(sys.modules) - known:
            if module.split(".")[0] in ("models", "utils", "options"):
                del sys.modules[module]
    return network


class Published:
    """A published network, as its programs call it."""

    def __init__(self, network: nn.Module, config: NCSRConfig, accelerated: bool) -> None:
        self.network, self.config = network.eval(), config
        if accelerated:
            accelerate(network)

    def decode(self, latents: list[Tensor], lr: Tensor) -> Tensor:
        return self.network(lr=lr, epses=list(latents), reverse=True, **self._noise(lr.new_zeros(1, 1, 1, 1)))[0]

    def loss(self, hr: Tensor, lr: Tensor, noise: Tensor) -> Tensor:
        nll = self.network(gt=hr, lr=lr, reverse=False, **self._noise(noise))[1]
        return backward(nll, list(self.network.parameters()))

    def images(self, lr: Tensor) -> None:
        """Ten images: of ten LR images where temperature has no effect, and else samples of another LR image every time."""
        count = 1 if self._is_deterministic else IMAGES
        for each in torch.rand_like(lr.expand(IMAGES // count, -1, -1, -1)).split(1):
            shape = self._shape(each)
            for _ in range(count):
                z = self.config.temperature * torch.randn(1, *shape)
                arguments = {"z": z, "eps_std": self.config.temperature, **self._noise(each.new_zeros(1, 1, 1, 1))}
                image = self.network(lr=each, reverse=True, **arguments)[0]
                if self.config.traits.base:
                    image += nn.functional.interpolate(each, scale_factor=self.config.scale, mode="bicubic")

    def _shape(self, lr: Tensor) -> tuple[int, int, int]:
        return self.config.flow.latent_shapes(*lr.shape[2:])[-1]

    @property
    def _is_deterministic(self) -> bool:
        return self.config.temperature == 0

    def _noise(self, noise: Tensor) -> dict[str, Tensor]:
        return {"std": noise} if self.config.noise_channels else {}


class Ours(Published):
    """Our model, called as documented."""

    def __init__(self, model: NCSR, config: NCSRConfig) -> None:
        super().__init__(model, config, accelerated=False)

    def decode(self, latents: list[Tensor], lr: Tensor) -> Tensor:
        return self.network.decode(latents, lr)

    def loss(self, hr: Tensor, lr: Tensor, noise: Tensor) -> Tensor:
        noise_condition = (noise,) if self.config.noise_channels else ()
        return backward(self.network.nll(hr, lr, *noise_condition), list(self.network.parameters()))

    def images(self, lr: Tensor) -> None:
        count = 1 if self._is_deterministic else IMAGES
        for each in torch.rand_like(lr.expand(IMAGES // count, -1, -1, -1)).split(1):
            self.network.sample(each, n=count, temperature=self.config.temperature)


def random_member(config: NCSRConfig, side: int) -> NCSR:
    """The model of `random_model`, its parameters moved less, since deep networks amplify what they are moved by."""
    return random_model("cpu", config, 1e-3, _images(config, 2, side)[:2])


def _images(config: NCSRConfig, batch: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """HR and LR images, and noise."""
    flow, generator = config.flow, torch.Generator().manual_seed(1)
    hr = torch.rand(batch, flow.channels, flow.scale * side, flow.scale * side, generator=generator)
    lr = torch.rand(batch, flow.lr_channels, side, side, generator=generator)
    return hr, lr, 0.03 * torch.randn(hr.shape, generator=generator)


def measure(arms: dict[str, Any], model: NCSR, side: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of both tasks. An arm whose results differ from ours has its `error` and no figures."""
    hr, lr, noise = _images(model.config, 1, side)
    generator = torch.Generator().manual_seed(2)
    shapes = model.latent_shapes(side, side)
    latents = [model.config.temperature * torch.randn(1, *shape, generator=generator) for shape in shapes]
    tasks: dict[str, tuple[str, Callable[[Any], Tensor], Callable[[Any], Any]]] = {
        "sample": (f"{IMAGES} images, LR {side}×{side}", lambda arm: arm.decode(latents, lr), lambda arm: arm.images(lr)),
        "train": (
            f"training step, {hr.shape[2]}×{hr.shape[3]}",
            lambda arm: arm.loss(hr, lr, noise),
            lambda arm: arm.loss(hr, lr, noise),
        ),
    }
    rows = []
    for task, (what, result, run) in tasks.items():
        with torch.set_grad_enabled(task == "train"):
            errors = _errors(arms, result)
            right = {name: lambda arm=arms[name]: run(arm) for name, error in errors.items() if isinstance(error, float)}
            right = {name: call for name, call in right.items() if errors[name] <= ALLOWED}
            times = side_by_side(right, "cpu", 0.0, rounds, warm_up=0)
        for name, error in errors.items():
            row = {"task": task, "what": what, "arm": name}
            if name in times:
                low, median, high = quantiles(times[name])
                figures = {"median_s": rounded(median), "p20_s": rounded(low), "p80_s": rounded(high), "rounds": rounds}
                rows.append(row | figures | {"errors": {task: rounded(error)}})
            else:
                text = error if isinstance(error, str) else f"its result is off by {error:.1e}, allowed {ALLOWED:.0e}"
                rows.append(row | {"error": text})
    return rows


def _errors(arms: dict[str, Any], result: Callable[[Any], Tensor]) -> dict[str, float | str]:
    """The relative error of every arm's result, or what it raised; ours is what they are compared with."""
    found: dict[str, Tensor | str] = {}
    for name, arm in arms.items():
        random.seed(0)
        try:
            found[name] = result(arm)
        except Exception as error:
            found[name] = brief(error)
    expected = found[OURS]
    if isinstance(expected, str):
        raise ValueError(f"our own model fails: {expected}")
    largest = float(expected.abs().max())

    def error(value: Tensor | str) -> float | str:
        return value if isinstance(value, str) else float((value - expected).abs().max()) / largest

    return {name: error(value) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the command is stored in the rows
    )
    parser.add_argument(
        "--published", nargs="+", action=Gathered, required=True, metavar="SYSTEM=CHECKOUT", help="presets and their checkouts"
    )
    parser.add_argument("--lr-size", type=int, help="side of the LR images (default: that of the published training)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--threads", type=thread_count, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the JSON rows (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = dict(_system(text) for text in args.published)

    where = provenance("cpu")
    paths = dict.fromkeys(given.values(), "PATH")
    where["command"] = recorded_command("ncsr_fast.benchmarks.family", sys.argv[1:], paths)
    stored = args.out / STORED
    rows = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else []
    failed = []
    for name, checkout in given.items():
        config = NCSRConfig.preset(name)
        side = args.lr_size or _SIDES[config.scale]
        model = random_member(config, side)
        networks = {arm: published_network(checkout, config) for arm in (PUBLISHED, ACCELERATED)}
        for network in networks.values():
            network.load_state_dict(model.published_state_dict())
        arms: dict[str, Any] = {arm: Published(network, config, arm == ACCELERATED) for arm, network in networks.items()}
        found = [
            {"system": name} | row | where for row in measure(arms | {OURS: Ours(model, config)}, model, side, args.rounds)
        ]
        rows = [row for row in rows if row["system"] != name] + found
        with atomic_write(stored) as path:  # after every member: a stopped run keeps it
            path.write_text(to_json(rows), encoding="utf-8")
        for row in found:
            print(f"{name}, {row['what']}, {row['arm']}: {row.get('error') or '{:.3g} s'.format(row['median_s'])}", flush=True)
        failed += [f"{name}, {row['what']}, {row['arm']}: {row['error']}" for row in found if "error" in row]
    if failed:
        raise ValueError("\n  ".join([f"{len(failed)} arms failed", *failed]))


def _system(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or name not in PRESETS:
        raise ValueError(f"--published takes SYSTEM=CHECKOUT, SYSTEM being one of {', '.join(PRESETS)}; not {text!r}")
    if not Path(path).is_dir():
        raise ValueError(f"--published {text}: there is no folder {path!r}")
    return name, Path(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"python -m {__spec__.name}: {error}")
