"""`ncsr-fast convert`: published checkpoints to model directories, and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ncsr_fast.cli._common import check_file, check_folder, path

if TYPE_CHECKING:
    from ncsr_fast.config import NCSRConfig

HELP = "turn a published checkpoint into a model directory, or back"
EXAMPLE = """\
example:
  ncsr-fast convert 200000_G.pth --out models/mine --report mine.txt
  ncsr-fast convert models/mine --out mine.pth
  ncsr-fast convert RRDB_DF2K_x4.pth --out models/encoder --long-skip last_block

NCSR and SRFlow networks, and RRDB generators (ESRGAN, BasicSR, Real-ESRGAN, ESRGAN+, and the encoders of SRFlow and NCSR) in
any naming; bare, with module. before their names, or wrapped. No file of a generator says where its long skip starts.
A name that ends in .pth or .pt is a file as the published programs load it, one in .safetensors the same tensors; any
other is a directory, for --model and NCSR.from_pretrained. Checkpoints are read without running anything in them. When a
tensor is missing, unexpected or of the wrong shape, all such are named, nothing is written, and the exit status is 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=path, help="published .pth or .safetensors, model directory, or name of a model")
    parser.add_argument("--out", required=True, type=path, help="what is written, in the kind its name asks for")
    parser.add_argument(
        "--options", metavar="FILE", type=path, help="published YAML, or config.json, of a flow that is none of the presets"
    )
    parser.add_argument(
        "--long-skip",
        choices=("conv_first", "last_block"),
        help="of a generator: conv_first in ESRGAN and its relatives, which is the default; last_block in the RRDB files of "
        "SRFlow and NCSR",
    )
    parser.add_argument("--report", metavar="FILE", type=path, help="write a line for each tensor: its name before, and after")


def run(args: argparse.Namespace) -> int | None:
    from ncsr_fast.convert import FILE_SUFFIXES, convert, written_files
    from ncsr_fast.files import CheckpointError, atomic_write
    from ncsr_fast.places import check_apart, files_of_model

    (check_file if args.out.endswith(FILE_SUFFIXES) else check_folder)("--out", args.out)
    if args.report:
        check_file("--report", args.report)
    out = Path(args.out)
    check_apart(
        {"--out": {out, *written_files(out)}, "--report": [args.report] if args.report else []},
        {"the source": files_of_model(args.source), "--options": [args.options] if args.options else []},
    )
    try:
        conversion = convert(
            args.source, args.out, None if args.options is None else _config(args.options), long_skip=args.long_skip
        )
    except CheckpointError as error:
        if not error.problems:
            raise
        print(f"ncsr-fast convert: {error}", file=sys.stderr)
        for kind, names in error.problems.items():
            print(f"{kind}:", *names, sep="\n  ", file=sys.stderr)
        return 1
    print(conversion.summary())
    if args.report:
        with atomic_write(args.report) as temporary:
            temporary.write_text(conversion.report() + "\n", encoding="utf-8")
    print(conversion.out)
    return None


def _config(file: str) -> NCSRConfig:
    from ncsr_fast.config import NCSRConfig
    from ncsr_fast.files import read_json

    try:
        if file.endswith(".json"):
            values = read_json(file)
            values.pop("model_type", None)
            return NCSRConfig.from_dict(values)
        import yaml

        try:
            return NCSRConfig.from_published(yaml.safe_load(Path(file).read_bytes()))
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
    except ImportError as error:
        raise ImportError("--options: a YAML needs pyyaml to be read: pip install 'ncsr_fast[train]'") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--options: {file!r} describes no model: {error}") from error
