"""The entry point of `ncsr-fast`: run a subcommand, and print errors that users can correct in one line."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ncsr_fast import __version__

COMMANDS = (
    "demo", "sample", "edit", "gallery", "train", "plot", "evaluate", "compare", "convert", "export", "bench", "tune", "doctor",
)  # fmt: skip
_CLOSED = 141  # exit status after a closed pipe: 128 + SIGPIPE


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
    """Run a command; return its exit status.

    Modules are imported inside this function, so that Ctrl-C during an import gives no traceback. Only during the import of
    PyTorch by `ncsr_fast` itself does it give one.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here a closed pipe or a full disk can still be reported
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _CLOSED
    except OSError as error:  # raised by the flush
        from ncsr_fast.cli._common import told

        print(f"ncsr-fast: standard output: {told(error)}", file=sys.stderr)
        return 1


def _run(argv: list[str] | None) -> int:
    from ncsr_fast.memory import is_out_of_memory

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the terminal's encoding may lack × or a character of a file's name
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        with _warnings_in_a_line(args.command):
            return args.function(args) or 0
    except BrokenPipeError:
        raise
    except Exception as error:
        expected = isinstance(error, (ValueError, ArithmeticError, OSError, ImportError))
        if not expected and not is_out_of_memory(error):
            raise
        print(f"ncsr-fast {args.command}: {_told(error)}", file=sys.stderr)
        return 1


def _told(error: Exception) -> str:
    """The message of an error that users can correct."""
    from ncsr_fast.cli._common import told

    if isinstance(error, MemoryError) and str(error):
        return str(error)  # raised by this package or numpy
    if isinstance(error, (MemoryError, RuntimeError)):
        return f"out of memory: {(str(error).strip() or 'none is left').splitlines()[0]}"
    return told(error) if isinstance(error, OSError) else str(error) or type(error).__name__


@contextmanager
def _warnings_in_a_line(command: str) -> Iterator[None]:
    """A context in which warnings are one line, without the line of source that they came from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"ncsr-fast {command}: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


if __name__ == "__main__":
    sys.exit(main())
