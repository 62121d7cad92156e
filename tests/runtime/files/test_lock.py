"""A folder is written by one process at a time, and a process that dies gives it back."""

import os
import signal
import subprocess
import sys
import time

import pytest

from runtime.files.lock import LOCK, locked

HOLDER = """
import sys, time
from runtime.files.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    folder = tmp_path / "run"
    refused = pytest.raises(ValueError, match=rf"run is being written by another process, {os.getpid()} on ")
    with locked(folder), refused, locked(folder):
        pass
    assert not list(folder.iterdir())  # nothing is left of the lock
    with locked(folder), locked(tmp_path / "other"):
        pass


def test_a_lock_that_its_holder_removed_meanwhile_keeps_nobody_out(tmp_path):
    with locked(tmp_path):
        (tmp_path / LOCK).unlink()  # as the holder does just before it lets go
        with locked(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} on ")


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"another process, {holder.pid} on "), locked(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            with locked(tmp_path):
                return
        except ValueError:
            time.sleep(0.05)
    pytest.fail("the lock outlived its process")
