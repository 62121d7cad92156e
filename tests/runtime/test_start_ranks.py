"""A signal reaches the ranks whenever it comes, and the status says so."""

import os
import signal
import sys

import psutil
import pytest

from runtime.ranks import start_ranks


class Mpirun:
    """Stands for mpirun: its ranks answer any signal by ending, which mpirun calls status 1 or their own."""

    def __init__(self, status):
        self.status, self.signals = status, []

    def children(self):
        return []

    def send_signal(self, number):
        self.signals.append(number)
        raise psutil.NoSuchProcess(1)  # it ended in the same moment

    def wait(self):
        return self.status


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(("number", "status", "expected"), [
    (signal.SIGINT, 1, 130), (signal.SIGTERM, 1, 143), (signal.SIGINT, 130, 130), (signal.SIGINT, 139, 139),
    (signal.SIGINT, 0, 0), (None, 1, 1),
])  # fmt: skip
def test_ranks_that_a_signal_ends_give_its_status(monkeypatch, early, number, status, expected):
    mpirun = Mpirun(status)

    def interrupt():
        if number:
            os.kill(os.getpid(), number)

    def start(*_, **__):
        if early:
            interrupt()
        return mpirun

    wait = mpirun.wait
    monkeypatch.setattr(mpirun, "wait", lambda: (early or interrupt(), wait())[1])
    monkeypatch.setattr("runtime.ranks.shutil.which", lambda _: "/usr/bin/mpirun")
    monkeypatch.setattr(psutil, "Popen", start)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py"])
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert start_ranks(2) == expected
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(each, handler)
    assert mpirun.signals == ([number] if number else [])
