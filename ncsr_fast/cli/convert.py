"""`ncsr-fast convert`: published checkpoints to model directories, and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ncsr_fast.cli._common import check_file, check_folder, path

if TYPE_CHECKING:
    from ncsr_fast.config import NCSRConfig

HELP = "convert a published checkpoint to a model directory, or back"
EXAMPLE = """\
example:
  ncsr-fast convert 200000_G.pth --out models/mine --report mine.txt
  ncsr-fast convert models/mine --out mine.pth
  ncsr-fast convert RRDB_DF2K_x4.pth --out models/encoder --long-skip last_block

The source may be an NCSR or SRFlow network, or an RRDB generator (ESRGAN, BasicSR, Real-ESRGAN, ESRGAN+, and the encoders of
SRFlow and NCSR) in any naming. A file may hold a bare state dict, names that begin with module., or a state dict in another
dict. A generator's file does not say where its long skip starts: see --long-skip.

The name of OUT chooses the kind of file. NAME.pth or NAME.pt is a file that the published programs load; NAME.safetensors holds
the same tensors; any other name is a directory for --model and NCSR.from_pretrained.

Checkpoints are read without executing anything in them. If tensors are missing, unexpected or of the wrong shape, all of them
are named, nothing is written, and the exit status is 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=path, help="published .pth or .safetensors file, model directory, or model name")
    parser.add_argument("--out", required=True, type=path, help="file or directory to write (see below)")
    parser.add_argument(
        "--options", metavar="FILE", type=path, help="published YAML, or config.json, of a flow that is not a preset"
    )
    parser.add_argument(
        "--long-skip",
        choices=("conv_first", "last_block"),
        help="where a generator's long skip starts: conv_first in ESRGAN and its relatives (the default), last_block in the "
        "RRDB files of SRFlow and NCSR",
    )
    parser.add_argument("--report", metavar="FILE", type=path, help="write a line for each tensor: its old and its new name")


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
        raise ImportError("--options: reading a YAML file needs pyyaml: pip install 'ncsr_fast[train]'") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--options: {file!r} does not describe a model: {error}") from error
