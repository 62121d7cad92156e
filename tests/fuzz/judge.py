"""Whether a reader did right by a file: took it, or refused it in one line that names it, and did nothing else."""

import contextlib
import re
import signal
import sys
import time
import warnings
from pathlib import Path

MOST_BYTES, MOST_S, MOST_CHARACTERS = 1 << 30, 20, 1200
# Events of Python's audit hooks that no reader of a file may cause.
FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn",
    "socket.", "shutil.", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.kill", "ctypes.dlopen",
)  # fmt: skip
STATUS = Path("/proc/self/status")
_watch = {"on": False, "seen": []}


class Fault(AssertionError):
    """A reader did wrong."""


class Slow(BaseException):
    """A reader took too long. No reader catches it."""


def _audit(event, arguments):
    if not _watch["on"]:
        return
    if event.startswith(FORBIDDEN) or (event == "open" and _writes(arguments)):
        _watch["seen"].append(f"{event} {arguments!r:.200}")


def _writes(arguments):
    mode = arguments[1]
    return isinstance(mode, str) and bool(set(mode) & set("wax+"))


sys.addaudithook(_audit)


def memory(name):
    """A figure of /proc/self/status in bytes. VmHWM: the most memory held since it was last forgotten; VmRSS: now."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)[1]) << 10


def forget_peak():
    """Set VmHWM back to what is held now: a process inherits the peak of the one that started it."""
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def _limited(seconds):
    def end(*_):
        raise Slow

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(read, folder, seconds=MOST_S):
    """(whether ``read(folder)`` accepted what lies in the folder, its seconds, the growth of the peak in bytes).

    Raises Fault for another error than a ValueError of one line that names a file there, for a program or a file that
    was written or started, for more than MOST_BYTES and for more than ``seconds``.
    """
    forget_peak()
    before, began, problem = memory("VmRSS"), time.perf_counter(), None
    recursion = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)  # as Jittor sets it
    _watch.update(on=True, seen=[])
    try:
        with _limited(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
            accepted = True
    except ValueError as error:
        accepted, text = False, str(error)
        if str(folder) not in text or len(text) > MOST_CHARACTERS or isinstance(error, UnicodeError):
            problem = f"{type(error).__name__} of {len(text)} characters that names no file: {text[:300]}"
    except Slow:
        accepted, problem = False, f"more than {seconds} s"
    except Exception as error:
        accepted, problem = False, f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        _watch["on"] = False
        sys.setrecursionlimit(recursion)
    if _watch["seen"]:
        problem = f"it did {_watch['seen'][0]}"
    growth = max(0, memory("VmHWM") - before)
    if growth > MOST_BYTES:
        problem = f"{growth / 1e9:.1f} GB of memory"
    if problem:
        raise Fault(problem)
    return accepted, time.perf_counter() - began, growth
