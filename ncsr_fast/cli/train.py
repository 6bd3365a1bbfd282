"""`ncsr-fast train`: train a model on folders of images, or resume a run."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

from ncsr_fast.cli._common import Gathered, add_device, path, pick_device
from ncsr_fast.training.configuration import VARIANTS, Configuration, configure
from ncsr_fast.training.settings import PUBLISHED, TrainSettings

HELP = "train a model on folders of images, or resume a run"
_HINTS = typing.get_type_hints(TrainSettings)


def _word(value: object) -> str:
    return " ".join(map(_word, value)) if isinstance(value, tuple) else str(value).lower()


_DEFAULTS = ", ".join(
    f"{field.name} {_word(field.default)}"
    for field in dataclasses.fields(TrainSettings)
    if field.default not in (dataclasses.MISSING, None, ())
)

# the settings are explained only in the docstring of TrainSettings
EXAMPLE = f"""\
example:
  ncsr-fast train --preset ncsr-compact-x4 --images photos/ --run runs/mine
  ncsr-fast train mine.yml --steps 50000 --model steps=8 hidden_channels=32
  ncsr-fast train -opt 4X.yml --images photos/

The same command, given again, resumes a run that was stopped. The trained model is written to RUN/model, for
`ncsr-fast sample --model RUN/model` or NCSR.from_pretrained("RUN/model"). Images, weights, settings and the folder of a run
are checked before it starts. Only one process at a time trains in a folder; RUN/lock says which.

A YAML file has a line `name: value` for each setting, and for `preset`, `variant`, `run` and `model`. Each of them is also
an option here, `--name value` with _ or -, which overrides the YAML file. Values of a list are separated by spaces (in
--model by commas). Truth values are true and false; none stands for None.

{inspect.cleandoc(TrainSettings.__doc__ or "")}

Defaults, unless the preset has others:
{textwrap.fill(_DEFAULTS, 118, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ncsr-fast train [CONFIG.yml] [--run RUN] [--SETTING VALUE ...]"
    parser.add_argument(
        "config", nargs="?", type=path, help="YAML file of settings, or a YAML file of the published NCSR and SRFlow programs"
    )
    parser.add_argument("-opt", metavar="YAML", type=path, help="another way to give CONFIG.yml, as in the published programs")
    parser.add_argument(
        "--run",
        "--run-dir",  # torchrun takes --run for one of its own options
        type=path,
        help="folder of log, checkpoints, samples and model (default: runs/NAME for NAME.yml); use --run-dir under torchrun",
    )
    parser.add_argument("--preset", help=f"architecture and its settings: {', '.join(PUBLISHED)}")
    parser.add_argument("--variant", help=f"variant of the noise condition: {', '.join(VARIANTS)}")
    parser.add_argument(
        "--model",
        nargs="+",
        action=Gathered,
        metavar="KEY=VALUE",
        help="fields of NCSRConfig that override the preset's, such as steps=8",
    )
    parser.add_argument("--estimate", action="store_true", help="only print how much memory the run would need")
    add_device(parser)
    for name, hint in _HINTS.items():
        if name != "model":
            flags = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
            parser.add_argument(*flags, dest=name, help=argparse.SUPPRESS, **_values(hint))


def _values(hint: object) -> dict[str, Any]:
    """Arguments of `add_argument` for a setting: the number of its values; `configure` checks the values."""
    if typing.get_origin(hint) is tuple:
        return {"nargs": "*", "action": Gathered}
    return {"nargs": "?", "const": "true"} if bool in (hint, *typing.get_args(hint)) else {}


def run(args: argparse.Namespace) -> int | None:
    configuration = _configuration(args)
    first = os.environ.get("RANK", "0") == "0"  # torchrun's processes all come through here
    if first:
        for line in configuration.report:
            print(line, file=sys.stderr)
    if args.estimate:
        from ncsr_fast.training.memory import estimate

        if first:
            print(estimate(configuration.settings))
        return None
    if configuration.run is None:
        raise ValueError("--run: should be the folder of the run; only with a YAML file may it be left out")
    if args.device != "auto":
        pick_device(args.device)
    from ncsr_fast.places import check_apart
    from ncsr_fast.training import OtherProcessFailed, TrainingStopped, train
    from ncsr_fast.training.run import written_files

    config = args.config or args.opt
    check_apart({"--run": written_files(Path(configuration.run))}, {"the YAML": [config] if config else []})

    try:
        train(configuration.settings, configuration.run, device=args.device, report=configuration.report)
    except OtherProcessFailed:  # which has said why
        return 1
    except TrainingStopped as stopped:
        if first:
            print(f"ncsr-fast train: {stopped}", file=sys.stderr)
        return stopped.exit_status
    if first:
        print(f"the model is in {configuration.run}/model")
    return None


def _configuration(args: argparse.Namespace) -> Configuration:
    if args.config and args.opt:
        raise ValueError(f"-opt: {args.opt!r} is a second YAML file besides {args.config!r}; give one of them")
    names = ("preset", "variant", "run", *(name for name in _HINTS if name != "model"))
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.model:
        overrides["model"] = dict(map(_pair, args.model))
    return configure(args.config or args.opt, overrides)


def _pair(text: str) -> tuple[str, str | list[str]]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--model: should be KEY=VALUE, not {text!r}")
    return key, value.split(",") if "," in value else value
