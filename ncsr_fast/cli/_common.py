"""What the subcommands share: the choice of a device and of a model."""

from __future__ import annotations

import argparse

import torch

DEFAULT_MODEL = "ncsr-compact-x4"


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: cuda if there is one, else cpu)")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="model directory, published .pth, shipped name, or user/name of the Hugging Face Hub (default: %(default)s)",
    )


def why_no_cuda() -> str:
    """What keeps this PyTorch from using a GPU, when `torch.cuda.is_available()` is false."""
    return "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch finds no CUDA device"


def pick_device(name: str) -> str:
    """The device called `name`, or the best there is for "auto". Raises ValueError when it is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device {name!r}: use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but {why_no_cuda()}; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return name
