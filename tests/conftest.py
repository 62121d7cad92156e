"""Settings of the whole suite: how OpenMP threads wait, and what ``--fast`` leaves out.

torch brings a libgomp that the kernels of the same process then share, and that reads its settings when it is loaded.
By default a waiting thread spins for milliseconds: on a busy machine a pass of 2 ms then takes 150.
"""

import os
import subprocess

import pytest

from runtime.start.bootstrap import SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
QUICK_PROGRAMS = ("git", "nvidia-smi", "uname")  # started by production code for provenance


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="skip what starts a process, emulates a GPU or takes seconds")


def pytest_configure(config):
    if config.getoption("--fast"):
        import ops.kernel  # late: it starts Jittor

        ops.kernel.emulated_cuda = skip_emulation


def pytest_collection_finish(session):
    if session.config.getoption("--fast"):  # not before: packages start programs when they are imported
        forbid_processes()


def forbid_processes():
    """Skip a test as soon as it starts a program."""
    start = subprocess.Popen.__init__

    def start_or_skip(self, args, *others, **settings):
        words = args if isinstance(args, (list, tuple)) else str(args).split()
        if os.path.basename(os.fspath(words[0])) not in QUICK_PROGRAMS:
            pytest.skip(f"--fast: starts {os.path.basename(os.fspath(words[0]))}")
        start(self, args, *others, **settings)

    subprocess.Popen.__init__ = start_or_skip


def skip_emulation():
    """Takes the place of ``ops.kernel.emulated_cuda``."""
    pytest.skip("--fast: emulates a GPU")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fast"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="--fast: takes seconds"))
