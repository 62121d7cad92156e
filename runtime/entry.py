"""What all command lines share: how a mistake is answered, and how an unknown name is."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence

USER_MISTAKE, INTERRUPTED = 2, 130


def suggest(kind: str, name: str, available: Iterable[str]) -> ValueError:
    """The error for an unknown name: the nearest known one, and all of them."""
    available = sorted(available)
    near = difflib.get_close_matches(name, available, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {kind} {name!r}.{hint} Available: {', '.join(available)}")


def run_entry(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status.

    A user's mistake (ValueError) and a file that cannot be read or written (OSError) become one line on stderr and
    status 2; Ctrl-C becomes status 130.
    """
    try:
        return main(sys.argv[1:] if arguments is None else arguments) or 0
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
