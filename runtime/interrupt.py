"""Ctrl-C, or a scheduler's SIGTERM, between two steps instead of inside one.

Python raises KeyboardInterrupt wherever it happens to be, inside Jittor also in a callback in the middle of a gradient.
Long work therefore notes the wish and stops at a place of its own choosing.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupts:
    """Whether Ctrl-C was pressed, or SIGTERM came, since the work began."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed; call it where stopping is safe."""
        if self.requested:
            self.requested = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt  # pressed twice: the user will not wait
        self.requested = True


_interrupts = Interrupts()


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed since the enclosing ``deferred_interrupts`` began."""
    _interrupts.check()


def interrupt_requested() -> bool:
    """Whether the next ``check_interrupt`` would raise."""
    return _interrupts.requested


def acknowledge_interrupt() -> None:
    """The wish was seen, perhaps on another rank: nothing raises for it any more."""
    _interrupts.requested = False


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """While the body runs, Ctrl-C and SIGTERM take effect at the next ``check_interrupt``, and a second one at once.

    One that no check has seen by the end of the body is raised then. Nesting is allowed; off the main thread, where
    Python delivers no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupts._note) for number in (signal.SIGINT, signal.SIGTERM)}
    outermost = before[signal.SIGINT] != _interrupts._note
    for number in before:
        # Jittor waits for the lock of its kernel cache in a system call that it takes for failed when a signal ends it.
        signal.siginterrupt(number, False)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
            signal.siginterrupt(number, outermost)
    if outermost:
        _interrupts.check()
