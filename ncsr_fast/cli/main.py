"""The entry point of `ncsr-fast`: finds the subcommand, runs it, and turns what users can mend into one line."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ncsr_fast import __version__

COMMANDS = ("demo", "sample", "edit", "train", "plot", "evaluate", "compare", "convert", "export", "bench", "tune", "doctor")
_CLOSED = 141  # the exit status of a program whose reader went away: 128 + SIGPIPE


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

    Everything is imported inside, so that Ctrl-C is no traceback there either. What comes before, PyTorch's import by
    `ncsr_fast` itself, is Python's own, and shows one.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, where a closed pipe or a full disk can still be told of
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _CLOSED
    except OSError as error:  # of the flush
        from ncsr_fast.cli._common import told

        print(f"ncsr-fast: standard output: {told(error)}", file=sys.stderr)
        return 1


def _run(argv: list[str] | None) -> int:
    from ncsr_fast.memory import is_out_of_memory

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a × or a file's name may have no place in the terminal's encoding
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
    """The message of an error that users can mend."""
    from ncsr_fast.cli._common import told

    if isinstance(error, MemoryError) and str(error):
        return str(error)  # ours, or numpy's
    if isinstance(error, (MemoryError, RuntimeError)):
        return f"out of memory: {(str(error).strip() or 'none is left').splitlines()[0]}"
    return told(error) if isinstance(error, OSError) else str(error) or type(error).__name__


@contextmanager
def _warnings_in_a_line(command: str) -> Iterator[None]:
    """Without the line of source that a warning came from, which users did not write."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"ncsr-fast {command}: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


if __name__ == "__main__":
    sys.exit(main())
