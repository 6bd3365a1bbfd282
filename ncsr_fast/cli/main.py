"""The entry point of `ncsr-fast`: finds the subcommand, runs it, and turns what users can mend into one line."""

from __future__ import annotations

import argparse
import importlib
import sys

from ncsr_fast import __version__

COMMANDS = ("demo", "sample", "train", "plot", "evaluate", "convert", "export", "bench", "doctor")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ncsr-fast", description="Super-resolution with conditional normalizing flows.")
    parser.add_argument("--version", action="version", version=f"ncsr-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"ncsr_fast.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=module.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(function=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return args.function(args) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, ArithmeticError, MemoryError, OSError, ImportError) as error:
        print(f"ncsr-fast {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
