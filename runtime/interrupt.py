"""Ctrl-C, or a scheduler's SIGTERM, between two steps instead of inside one.

Python raises KeyboardInterrupt wherever it happens to be; inside Jittor that may be a callback in the middle of a
gradient. Long work therefore records the signal and stops at a safe place.
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
            raise KeyboardInterrupt  # the second one: the user will not wait
        self.requested = True


_interrupts = Interrupts()


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed since the enclosing ``deferred_interrupts`` began."""
    _interrupts.check()


def interrupt_requested() -> bool:
    """Whether the next ``check_interrupt`` would raise."""
    return _interrupts.requested


def acknowledge_interrupt() -> None:
    """The request was handled, perhaps on another rank: it no longer raises."""
    _interrupts.requested = False


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM take effect at the next ``check_interrupt``, and a second one at once.

    A signal that no check has seen is raised at the end of the body. Nesting is allowed; off the main thread, where
    Python delivers no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupts._note) for number in (signal.SIGINT, signal.SIGTERM)}
    outermost = before[signal.SIGINT] != _interrupts._note
    for number in before:
        # Jittor waits for the lock of its kernel cache in a system call, and takes an interrupted call for a failed
        # one.
        signal.siginterrupt(number, False)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
            signal.siginterrupt(number, outermost)
    if outermost:
        _interrupts.check()
