"""What all command lines share: the answers to mistakes and to unknown names."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from runtime.files.shown import MOST, shown
from runtime.ranks import leave
from runtime.start.bootstrap import under_mpi

USER_MISTAKE, INTERRUPTED = 2, 130


def suggest(kind: str, name: str, available: Iterable[str]) -> ValueError:
    """The error for an unknown name: the nearest known one, and all of them."""
    available = sorted(available)
    near = difflib.get_close_matches(name[:MOST], available, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {kind} {shown(name)}.{hint} Available: {', '.join(available)}")


def unknown_option(parser: argparse.ArgumentParser, unknown: list[str]) -> ValueError:
    """The error for words that ``parse_known_args`` did not recognize; suggests the option nearest to the first."""
    flag = unknown[0].split("=")[0]
    if not flag.startswith("-"):
        return ValueError(f"unexpected argument {flag!r}; options start with --")
    return suggest("option", flag, [known for action in parser._actions for known in action.option_strings])


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes raise ValueError, so that ``run_entry`` answers them; unknown options get a
    suggestion."""

    def error(self, message: str):
        raise ValueError(message)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise unknown_option(self, unknown)
        return options

    def _check_value(self, action: argparse.Action, value) -> None:
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[0] if action.option_strings else action.dest
            raise suggest(name, str(value), action.choices)


def run_entry(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status.

    A user's mistake (ValueError), a file that cannot be read or written (OSError) and a run whose numbers are no longer
    finite (FloatingPointError) become one line on stderr and status 2; Ctrl-C becomes status 130. Under ``mpirun`` a
    process that fails ends at once (``runtime.ranks.leave``).
    """
    try:
        status = main(sys.argv[1:] if arguments is None else arguments) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        rank = f"rank {os.environ['OMPI_COMM_WORLD_RANK']}: " if under_mpi() else ""
        print(f"{rank}error: {' '.join(str(error).split())}", file=sys.stderr)
        status = USER_MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except Exception:
        if under_mpi():  # the other ranks wait for this one: an orderly exit would hang
            traceback.print_exc()
            leave(1)
        raise
    leave(status)
    return status
