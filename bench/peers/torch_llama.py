"""transformers on torch beside our engine: the same work, the same number of threads, in turns with ours.

It runs in a separate process: torch brings an OpenMP library that all kernels of a process share, and how its threads
wait at a barrier is settled once. Its dtypes are tried with both ways of waiting, and the fastest is compared. It runs
as transformers runs it by default, uncompiled, with its own cache. torch comes with requirements-dev.txt only.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from backbone.config import BackboneConfig
from backbone.tokenizer import EMBEDDED
from bench.clock.memory import available_memory
from bench.clock.shapes import config_from, weight_bytes
from bench.record.files import ROOT
from runtime.files.documents import parse_json, to_json
from runtime.start.bootstrap import SPIN_COUNT

DTYPES = ("float32", "bfloat16", "float16")
MISSING = "torch is not installed: transformers was not measured; it comes with requirements-dev.txt"
TRIALS = 3  # timed calls of a trial
QUIET_S = 0.01  # pause after a call, by the end of which its threads sleep and take nothing from ours
SPIN = "GOMP_SPINCOUNT"  # how long a thread spins at a barrier before it sleeps
Call = Callable[[], object]


class Child:
    """A process that does a task once per question and answers with its seconds. sleeping: its waiting threads soon
    sleep, as ours do, or spin as torch has it.

    Raises RuntimeError, as ``ask`` does, if the process ends instead: the call cannot be made in this dtype. The first
    call is the warm-up.
    """

    def __init__(self, task: dict[str, Any], dtype: str, sleeping: bool):
        environment = {name: value for name, value in os.environ.items() if name != SPIN}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.peers.torch_llama"],
            cwd=ROOT,
            env=environment | ({SPIN: SPIN_COUNT} if sleeping else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the process that asks, between two answers
        )
        self.ask({**task, "dtype": dtype})

    def ask(self, question: Any = None) -> float:
        """The seconds of the next call."""
        try:
            print(to_json(question), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.stdout.close()
            raise RuntimeError(f"transformers ended with status {self.process.wait()}")
        time.sleep(QUIET_S)
        return parse_json(answer, "transformers")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@dataclass
class Choice:
    """The fastest way: calling it does the work once and gives the seconds it took. best_ms: of its trial; trials_ms:
    of all, by "<dtype>" and "<dtype>, sleeping", None for one that does not run."""

    dtype: str
    sleeping: bool
    best_ms: float
    trials_ms: dict[str, float | None]
    child: Child

    @property
    def versions(self) -> dict[str, str]:
        """Of transformers and torch."""
        return {name: metadata.version(name) for name in ("transformers", "torch")}

    def __call__(self) -> float:
        return self.child.ask()

    def close(self) -> None:
        self.child.close()


def find_peer(
    name: str,
    config: BackboneConfig,
    prompt: np.ndarray | None,
    tokens: int,
    context: int,
    threads: int,
    notes: list[str],
) -> Choice | None:
    """transformers at the work of ``bench.clock.passes.our_call``: the embedded backbone's text for a prompt, else one
    row after ``context``. None, with a note, if it cannot be measured."""
    if importlib.util.find_spec("torch") is None:
        notes.append(MISSING)
        return None
    dtypes = [dtype for dtype in DTYPES if fits(config, dtype, available_memory())]
    notes.extend(f"{name}: no memory for transformers in {dtype}" for dtype in sorted(set(DTYPES) - set(dtypes)))
    task = {"config": dataclasses.asdict(config), "context": context, "threads": threads}
    if prompt is not None:
        task |= {"prompt": np.asarray(prompt).tolist(), "tokens": tokens}
    choice = choose(task, dtypes)
    if choice is None:
        notes.append(f"{name}: transformers runs in none of {', '.join(dtypes) or 'its dtypes'} here")
    return choice


def fits(config: BackboneConfig, dtype: str, available: int) -> bool:
    """Whether a model of this size has room for itself and its passes in ``available`` bytes."""
    return 1.1 * weight_bytes(config, "float32" if dtype == "float32" else "float16") < available


def choose(task: dict[str, Any], dtypes=DTYPES, start=Child) -> Choice | None:
    """Try every dtype, with waiting threads spinning and sleeping, one process at a time; the fastest is started again.
    None if none runs."""
    trials = {
        (dtype, sleeping): _trial_ms(task, dtype, sleeping, start) for dtype in dtypes for sleeping in (False, True)
    }
    known = {way: ms for way, ms in trials.items() if ms is not None}
    if not known:
        return None
    dtype, sleeping = min(known, key=known.get)
    named = {name + (", sleeping" if asleep else ""): ms for (name, asleep), ms in trials.items()}
    return Choice(dtype, sleeping, known[dtype, sleeping], named, start(task, dtype, sleeping))


def _trial_ms(task: dict[str, Any], dtype: str, sleeping: bool, start) -> float | None:
    try:
        child = start(task, dtype, sleeping)
    except RuntimeError:  # no kernels for this dtype here, or no memory
        return None
    seconds = [child.ask() for _ in range(TRIALS)]
    child.close()
    return float(np.median(seconds)) * 1e3


# In the process ------------------------------------------------------------------------------------------------------


def generator(prompt_ids: np.ndarray, num_tokens: int, threads: int) -> Callable[[str], Call]:
    """dtype -> a call that decodes ``num_tokens`` tokens greedily on the embedded backbone with ``generate`` and
    returns their ids."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(threads)
    ids = torch.tensor(np.asarray(prompt_ids)[None], dtype=torch.long)

    def make(dtype: str) -> Call:
        model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=getattr(torch, dtype)).eval()
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
    """dtype -> a call that runs one row after ``context`` cached ones, on random weights of this size."""
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
    """A LlamaForCausalLM with random weights, each drawn once."""
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


def main() -> None:
    """Make the call of the task, the first question, and again for every further one; answer with its seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    questions = (parse_json(line, "the question") for line in iter(sys.stdin.readline, ""))
    task = next(questions)
    if "prompt" in task:
        make = generator(task["prompt"], task["tokens"], task["threads"])
    else:
        make = stepper(config_from(task["config"]), task["context"], task["threads"])
    call = make(task["dtype"])
    for _ in itertools.chain([task], questions):
        begin = time.perf_counter()
        call()
        print(to_json(time.perf_counter() - begin), file=answers, flush=True)


if __name__ == "__main__":
    main()
