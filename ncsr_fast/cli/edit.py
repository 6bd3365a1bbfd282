"""`ncsr-fast edit`: images by their latents."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ncsr_fast.cli._common import (
    add_device,
    add_model,
    add_to_8bit,
    check_file,
    check_folder,
    count,
    path,
    pick_device,
    recommended_temperature,
    seed,
    temperature,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ncsr_fast.flow.samples import ConditionedFlow

HELP = "edit an image by its latents: interpolate, redraw, restore, transfer"
EXAMPLE = """\
example:
  ncsr-fast edit interpolate small.png --seeds 0 1 --steps 5 --out between/
  ncsr-fast edit redraw small.png --box 10 20 8 8 --n 4 --out parts/
  ncsr-fast edit restore small.png smooth.png --out sharp.png
  ncsr-fast edit transfer small.png large.png content.png --at 40 80 --out edited.png

small.png is an LR image, large.png and smooth.png are HR images of it, scale times as large.
interpolate  images on the arc between two samples, from the first to the second
redraw       samples that differ in a box of LR pixels alone: ROW COLUMN HEIGHT WIDTH
restore      an HR image that is too smooth, with the detail that its latents ask for too faintly
transfer     an HR image into which content was pasted, at a row and column of HR pixels, made to belong there"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name, (help_text, add, run_tool) in _TOOLS.items():
        tool = tools.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        tool.add_argument("lr", type=path, help="LR image")
        add(tool)
        tool.add_argument("--temperature", type=temperature, help="of the latents (default: what the model recommends)")
        add_to_8bit(tool)
        add_model(tool)
        add_device(tool)
        tool.set_defaults(tool_function=run_tool)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import torch

    from ncsr_fast.model import NCSR
    from ncsr_fast.places import check_apart, files_of_model

    device = pick_device(args.device)
    targets = args.tool_function(args, None)
    read = [getattr(args, name) for name in ("lr", "image", "content") if getattr(args, name, None)]
    check_apart({"--out": targets}, {"the input": read, "--model": files_of_model(args.model)})
    model = NCSR.from_pretrained(args.model).to(device).eval()
    args.temperature = recommended_temperature(model) if args.temperature is None else args.temperature
    with torch.inference_mode():
        args.tool_function(args, model.condition(_read(args.lr, model.inputs.like), tile="auto"))
    print(f"{len(targets)} images → {args.out}")


def _add_interpolate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=seed, nargs=2, default=[0, 1], help="of the two samples (default: 0 1)")
    parser.add_argument("--steps", type=count, default=5, help="images, the two included (default: %(default)s)")
    parser.add_argument("--out", required=True, type=path, help="folder the PNG files are written to")


def _interpolate(args: argparse.Namespace, flow: ConditionedFlow | None) -> list[Path]:
    from ncsr_fast.latents import images_of, interpolate

    if args.steps < 2:
        raise ValueError(f"--steps counts the two ends, so it must be 2 or more, not {args.steps}")
    targets = _numbered(args, args.steps, "step")
    if flow is not None:
        first, second = (_drawn(flow, args.temperature, number) for number in args.seeds)
        for index, target in enumerate(targets):
            _write(target, images_of(flow, interpolate(first, second, index / (args.steps - 1))), args.to_8bit)
    return targets


def _add_redraw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="?", type=path, help="HR image whose rest stays (default: a sample, of --seed)")
    parser.add_argument(
        "--box", required=True, type=int, nargs=4, metavar=("ROW", "COLUMN", "HEIGHT", "WIDTH"), help="in LR pixels"
    )
    parser.add_argument("--n", type=count, default=4, help="images (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of the sample and of the draws (default: %(default)s)")
    parser.add_argument("--out", required=True, type=path, help="folder the PNG files are written to")


def _redraw(args: argparse.Namespace, flow: ConditionedFlow | None) -> list[Path]:
    from ncsr_fast.latents import box_mask, redraw

    targets = _numbered(args, args.n, "redrawn")
    if flow is not None:
        mask = box_mask(flow.lr, *args.box)
        latents = _drawn(flow, args.temperature, args.seed) if args.image is None else _encoded(flow, args.image)
        generator = _generator(flow, args.seed + 1)
        for target in targets:
            _write(target, redraw(flow, latents, mask, args.temperature, generator), args.to_8bit)
    return targets


def _add_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=path, help="HR image that is too smooth")
    parser.add_argument(
        "--window", type=count, help="side of the window, in pixels of each latent, that gets its detail by itself (odd)"
    )
    parser.add_argument("--out", required=True, type=path, help="the PNG file to write")


def _restore(args: argparse.Namespace, flow: ConditionedFlow | None) -> list[Path]:
    from ncsr_fast.latents import restore

    target = check_file("--out", args.out)
    if flow is not None:
        _write(target, restore(flow, _read(args.image, flow.lr), args.temperature, window=args.window), args.to_8bit)
    return [target]


def _add_transfer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=path, help="HR image")
    parser.add_argument("content", type=path, help="what is pasted into it")
    parser.add_argument("--project", action="store_true", help="put it onto the LR image first: its detail, not its colours")
    parser.add_argument("--at", required=True, type=int, nargs=2, metavar=("ROW", "COLUMN"), help="in HR pixels")
    parser.add_argument("--out", required=True, type=path, help="the PNG file to write")


def _transfer(args: argparse.Namespace, flow: ConditionedFlow | None) -> list[Path]:
    from ncsr_fast.latents import box_mask, paste, transfer

    target = check_file("--out", args.out)
    if flow is not None:
        content, scale = _read(args.content, flow.lr), flow.config.scale
        pasted = paste(_read(args.image, flow.lr), content, *args.at)
        first = [place // scale for place in args.at]
        last = [-(-(place + side) // scale) for place, side in zip(args.at, content.shape[2:])]
        mask = box_mask(flow.lr, *first, last[0] - first[0], last[1] - first[1])
        _write(target, transfer(flow, pasted, mask, args.temperature, project=args.project), args.to_8bit)
    return [target]


_TOOLS = {
    "interpolate": ("images between two samples", _add_interpolate, _interpolate),
    "redraw": ("draw a part of an image anew", _add_redraw, _redraw),
    "restore": ("give detail to an image that is too smooth", _add_restore, _restore),
    "transfer": ("paste something into an image, and make it belong there", _add_transfer, _transfer),
}


def _numbered(args: argparse.Namespace, number: int, what: str) -> list[Path]:
    folder, stem = check_folder("--out", args.out), Path(args.lr).stem
    return [folder / f"{stem}_{what}{index:03d}.png" for index in range(number)]


def _read(file: str, like: Tensor) -> Tensor:
    from ncsr_fast.data.images import read_image, to_float

    return to_float(read_image(file))[None].to(like)


def _write(target: Path, images: Tensor, to_8bit: str) -> None:
    from ncsr_fast.data.images import write_image

    write_image(target, images[0], to_8bit)


def _generator(flow: ConditionedFlow, number: int) -> torch.Generator:
    import torch

    return torch.Generator(flow.lr.device).manual_seed(number % 2**64)


def _drawn(flow: ConditionedFlow, heat: float, number: int) -> Sequence[Tensor]:
    """The latents of the first sample of a seed, as `ncsr-fast sample` draws it."""
    return [latent[:, 0] for latent in flow.draw(1, heat, _generator(flow, number))]


def _encoded(flow: ConditionedFlow, file: str) -> Sequence[Tensor]:
    return flow.encode(flow.residual(_read(file, flow.lr))).latents
