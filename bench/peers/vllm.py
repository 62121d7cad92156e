"""vLLM drafting with an exported head: what it accepts, text by text, in an environment of its own.

``ask`` starts the other environment's Python with this module as its program, which loads only what vLLM brings. Texts
are decoded one at a time, greedily, in float32 on the CPU; a draft is one chain.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runtime.files.documents import parse_json, to_json

ROOT = Path(__file__).resolve().parents[2]
MODULE = "bench.peers.vllm"
PASSED_ON = re.compile(r"See root cause|raise ")  # lines of a process that reports another one's error
COUNTERS = "vllm:spec_decode_num_"  # names of vLLM's counters of drafts
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without: most of the memory
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def ask(python: str, task: dict[str, Any]) -> dict[str, Any]:
    """The answer of ``serve`` to a task. Raises ValueError with the reason where vLLM ends without one."""
    done = subprocess.run(
        [str(Path(python).absolute()), "-m", MODULE],  # not resolved: an environment's Python is a link to another one
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        input=to_json(task),
        capture_output=True,
        text=True,
    )
    if done.returncode or not done.stdout.strip():
        raise ValueError(f"vLLM ended with status {done.returncode}: {reason(done.stderr)}")
    return parse_json(done.stdout.splitlines()[-1], MODULE)


def reason(text: str) -> str:
    """The line of a log that says why a program ended: the last one that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    named = (line for line in reversed(lines) if re.search(r"\b[A-Z]\w+Error\b", line) and not PASSED_ON.search(line))
    return next(named, lines[-1])


# In the other environment --------------------------------------------------------------------------------------------


def serve(task: dict[str, Any]) -> dict[str, Any]:
    """Decode texts with a drafted chain.

    task: backbone, a folder; draft, vLLM's speculative_config; prompts, token ids of each text; max_new_tokens,
    stop_ids and max_length. The answer has, of each text: tokens, its new token ids; passes, the tokens that each
    pass after the prefill added; drafts, the number of drafts; accepted, the drafts accepted at each position; and
    seconds, of its passes without the prefill.
    """
    import torch
    import transformers
    import vllm

    engine = vllm.LLM(
        task["backbone"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=task["max_length"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=task["draft"],
    )
    settings = vllm.SamplingParams(
        temperature=0, max_tokens=task["max_new_tokens"], stop_token_ids=task["stop_ids"], detokenize=False
    )
    texts = []
    for number, prompt in enumerate([task["prompts"][0], *task["prompts"]]):  # the first one once more, to warm up
        before = counters(engine)
        text = decode(engine.llm_engine, str(number), prompt, settings)
        texts.append({**text, **{name: subtract(count, before[name]) for name, count in counters(engine).items()}})
    versions = {module.__name__: module.__version__ for module in (vllm, torch, transformers)}
    return {"texts": texts[1:], "versions": versions}


def decode(engine, name: str, prompt: list[int], settings) -> dict[str, Any]:
    """One text, pass by pass."""
    engine.add_request(name, {"prompt_token_ids": prompt}, settings)
    tokens, passes, first, last = [], [], 0.0, 0.0
    while engine.has_unfinished_requests():
        for output in engine.step():
            now, last = list(output.outputs[0].token_ids), time.perf_counter()
            if tokens and len(now) > len(tokens):
                passes.append(len(now) - len(tokens))
            elif now and not tokens:
                first = last
            tokens = now
    return {"tokens": tokens, "passes": passes, "seconds": last - first}


def counters(engine) -> dict[str, Any]:
    """vLLM's counts so far: drafts, and accepted by position."""
    found = {metric.name.removeprefix(COUNTERS): metric for metric in engine.get_metrics()}
    return {"drafts": found["drafts"].value, "accepted": list(found["accepted_tokens_per_pos"].values)}


def subtract(count, before):
    """A count since an earlier one, also of each position."""
    return [a - b for a, b in zip(count, before, strict=True)] if isinstance(count, list) else count - before


def main() -> None:
    """Answer one task. stdout is for the answer alone: what vLLM prints goes to stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(to_json(serve(parse_json(sys.stdin.read(), "stdin"))), file=answer, flush=True)


if __name__ == "__main__":
    main()
