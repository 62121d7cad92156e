"""A process that answers line by line: torch and our kernels cannot share one, and a peak of memory is a process's.

torch brings an OpenMP library that all kernels of a process share; how its threads wait is settled once, and what suits
our kernels need not suit torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.record.files import ROOT
from runtime.start.bootstrap import SPIN_COUNT

SPIN = "GOMP_SPINCOUNT"  # how long a thread spins at a barrier before it sleeps; see runtime/start/bootstrap.py


def torch_environment(sleeping: bool) -> dict[str, str]:
    """The environment of a process that runs torch. sleeping: waiting threads soon sleep, as ours do, or as torch has
    it."""
    environment = {name: value for name, value in os.environ.items() if name != SPIN}
    return environment | ({SPIN: SPIN_COUNT} if sleeping else {})


class Child:
    """``python -m module``, which answers each line of JSON with one. quiet_s: pause after an answer, by the end of
    which its threads sleep and take nothing from ours."""

    def __init__(self, module: str, *words: str, environment: Mapping[str, str], quiet_s: float):
        self.name, self.quiet_s = module, quiet_s
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the process that asks, between two answers
        )

    def ask(self, question: Any = None) -> Any:
        """The answer to a question. Raises RuntimeError if the process ends instead."""
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.stdout.close()
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        time.sleep(self.quiet_s)
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve() -> tuple[Iterator[Any], Callable[[Any], None]]:
    """(the questions, what answers one), of the process that is asked. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    questions = map(json.loads, iter(sys.stdin.readline, ""))
    return questions, lambda answer: print(json.dumps(answer), file=answers, flush=True)
