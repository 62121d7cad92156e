"""transformers on torch beside our engine: the same work, the same number of threads, in turns with ours.

It runs in a process of its own: torch brings an OpenMP library that all kernels of a process share, how its threads
wait is settled once, and what suits our kernels need not suit torch. Its types are tried with both ways of waiting,
and the fastest is what to compare with. It runs as transformers runs it by default, uncompiled, with its own cache.
torch comes with requirements-dev.txt alone.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from backbone.config import BackboneConfig
from bench.clock.shapes import config_from, weight_bytes

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float32", "bfloat16", "float16")
MISSING = "torch is not installed: transformers was not measured; it comes with requirements-dev.txt"
TRIALS = 3  # timed calls that choose
WAYS = (False, True)  # whether waiting threads soon sleep, as ours do, or as torch has it
SPIN = "GOMP_SPINCOUNT"  # how long a thread turns at a barrier before it sleeps; see runtime/start/bootstrap.py
QUIET_S = 0.01  # after a call: by then its threads sleep and take nothing from ours
Call = Callable[[], object]


def missing() -> str | None:
    """Why transformers cannot be measured here; None when it can."""
    return None if importlib.util.find_spec("torch") else MISSING


def versions() -> dict[str, str]:
    """Of transformers and torch."""
    return {name: metadata.version(name) for name in ("transformers", "torch")}


def generator(directory, prompt_ids: np.ndarray, num_tokens: int, threads: int) -> Callable[[str], Call]:
    """dtype -> a call that decodes ``num_tokens`` tokens greedily with ``generate`` and returns their ids."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(threads)
    ids = torch.tensor(np.asarray(prompt_ids)[None], dtype=torch.long)

    def make(dtype: str) -> Call:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        model.generation_config.eos_token_id = None  # the text may not end early
        rules = {"max_new_tokens": num_tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}

        def call() -> list[int]:
            with torch.inference_mode():
                new = model.generate(ids, **rules)[0, ids.shape[1] :].tolist()
            assert len(new) == num_tokens, (len(new), num_tokens)
            return new

        return call

    return make


def stepper(config: BackboneConfig, context: int, threads: int) -> Callable[[str], Call]:
    """dtype -> a call that runs one row behind ``context`` cached ones, on random weights of this size."""
    import torch
    from transformers import DynamicCache

    torch.set_num_threads(threads)

    def make(dtype: str) -> Call:
        model, kind = _random_model(config, dtype), getattr(torch, dtype)
        cache, row = DynamicCache(), torch.ones((1, 1), dtype=torch.long)
        for layer in range(config.num_layers):
            keys, values = torch.randn(2, 1, config.num_kv_heads, context, config.head_dim).to(kind)
            cache.update(keys, values, layer)

        def call():
            with torch.inference_mode():
                logits = model(input_ids=row, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits

        return call

    return make


def _random_model(config: BackboneConfig, dtype: str):
    """A LlamaForCausalLM with random weights, made without drawing each of them several times over."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu").eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(settings)  # its frequencies are computed, not loaded
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                scale = (3 / parameter.shape[1]) ** 0.5  # variance 1 / in
                parameter.uniform_(-scale, scale)
    return model


def fits(config: BackboneConfig, dtype: str, available: int) -> bool:
    """Whether a model of this size has room for itself and its passes in ``available`` bytes."""
    return 1.1 * weight_bytes(config, "float32" if dtype == "float32" else "float16") < available


class TorchProcess:
    """A process that makes one call whenever it is asked to."""

    def __init__(self, task: dict, dtype: str, sleeping: bool):
        """task: as ``text_task`` or ``step_task`` makes it. sleeping: whether waiting threads soon sleep, as ours do,
        or as torch has it. Raises RuntimeError when the call cannot be made in this type."""
        environment = {name: value for name, value in os.environ.items() if name != SPIN}
        if sleeping:
            from runtime.start.bootstrap import SPIN_COUNT

            environment[SPIN] = SPIN_COUNT
        command = [sys.executable, "-m", "bench.peers.torch_llama", json.dumps({**task, "dtype": dtype})]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        self._read()  # the warm-up's

    def __call__(self) -> float:
        """Seconds of a call, by the clock of the process."""
        print(file=self._process.stdin, flush=True)
        seconds = self._read()
        time.sleep(QUIET_S)
        return seconds

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _read(self) -> float:
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"the process of transformers left with status {self._process.returncode}")
        return float(line)


def text_task(directory, prompt_ids: np.ndarray, num_tokens: int, threads: int) -> dict:
    """A text, greedily: see ``generator``."""
    ids = np.asarray(prompt_ids).tolist()
    return {"what": "generate", "directory": str(directory), "prompt": ids, "tokens": num_tokens, "threads": threads}


def step_task(config: BackboneConfig, context: int, threads: int) -> dict:
    """A row: see ``stepper``."""
    return {"what": "step", "config": dataclasses.asdict(config), "context": context, "threads": threads}


@dataclass
class Choice:
    """The fastest way, its call and its trial. trials_ms: milliseconds of a trial call by "<type>" and
    "<type>, sleeping"; None where it does not run."""

    dtype: str
    sleeping: bool
    call: TorchProcess
    best_ms: float
    trials_ms: dict[str, float | None]


def choose(task: dict, dtypes=DTYPES, start=TorchProcess) -> Choice | None:
    """Try every type, awake and asleep, one process at a time; the fastest is started again and kept. None when none
    runs."""
    trials = {(dtype, sleeping): _trial_ms(task, dtype, sleeping, start) for dtype in dtypes for sleeping in WAYS}
    known = {way: ms for way, ms in trials.items() if ms is not None}
    if not known:
        return None
    dtype, sleeping = min(known, key=known.get)
    named = {name + (", sleeping" if asleep else ""): ms for (name, asleep), ms in trials.items()}
    return Choice(dtype, sleeping, start(task, dtype, sleeping), known[dtype, sleeping], named)


def _trial_ms(task: dict, dtype: str, sleeping: bool, start) -> float | None:
    try:
        call = start(task, dtype, sleeping)
    except RuntimeError:  # this type has no kernels here, or no memory
        return None
    seconds = [call() for _ in range(TRIALS)]
    call.close()
    return float(np.median(seconds)) * 1e3


def main() -> None:
    """Make the call of the task in the first argument once, and again for every line on stdin; answer with seconds."""
    task, answers = json.loads(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    if task["what"] == "generate":
        make = generator(task["directory"], task["prompt"], task["tokens"], task["threads"])
    else:
        make = stepper(config_from(task["config"]), task["context"], task["threads"])
    call = make(task["dtype"])
    while True:
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, file=answers, flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main()
