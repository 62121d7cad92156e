"""What ``llama-bench -o json`` measures, by the xllamacpp wheel, which carries llama.cpp without its tools.

``bench/peers/llama_cpp.py --python FILE`` runs this module in the environment that has the wheel; it loads nothing
else. A pass of n rows after a context is a prompt of the context, which stays in the cache, and n other tokens; the
server says how long they took, its own work included.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata

from runtime.files.documents import to_json

FIRST, KINDS = 10, 200  # tokens of prompts: any of them, as long as a vocabulary has them


def parse() -> argparse.Namespace:
    """The options of llama-bench that ``bench.peers.llama_cpp.command`` passes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", required=True)
    parser.add_argument("-o", choices=["json"])
    for name in ("-r", "-ngl", "-n", "-d", "-t"):
        parser.add_argument(name, type=int, default=0)
    parser.add_argument("-p", type=lambda text: [int(part) for part in text.split(",")])
    return parser.parse_args()


class Bench:
    """A server in this process, with one text at a time."""

    def __init__(self, asked: argparse.Namespace):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_gpu_layers, settings.n_parallel = asked.m, asked.ngl, 1
        settings.n_ctx = asked.d + max([*asked.p, asked.n]) + 2
        settings.n_batch = settings.n_ubatch = settings.n_ctx  # a pass is one batch
        if asked.t:
            settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = asked.t
        self.context = [FIRST + place % KINDS for place in range(asked.d)]
        self.threads = settings.cpuparams.n_threads
        self.server = xllamacpp.Server(settings)
        self.calls = 0

    def timings(self, rows: int, new_tokens: int) -> dict:
        """The server's times of ``rows`` after the context, and of new tokens. Raises RuntimeError where the cache did
        not hold exactly the context, so that other rows were computed."""
        self.calls += 1  # the first row differs from the last call's, so that only the context is found in the cache
        prompt = self.context + [FIRST + (self.calls + place) % KINDS for place in range(rows)]
        settings = {"n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
        found = self.server.handle_completions({"prompt": prompt, **settings})
        times = found["timings"]
        if self.calls > 1 and (times["cache_n"], times["prompt_n"]) != (len(self.context), rows):
            raise RuntimeError(
                f"{times['prompt_n']} rows after {times['cache_n']}, expected {rows} after {len(self.context)}"
            )
        return times


def measure(asked: argparse.Namespace) -> list[dict]:
    """One entry a number of rows and one of generation, in llama-bench's form."""
    bench = Bench(asked)
    bench.timings(1, 0)  # computes the context
    facts = {
        "build_commit": f"xllamacpp {metadata.version('xllamacpp')}",
        "model_filename": asked.m,
        "n_threads": bench.threads,
        "n_depth": asked.d,
    }
    entries = []
    for rows in asked.p:
        bench.timings(rows, 0)  # warms up
        samples = [bench.timings(rows, 0)["prompt_ms"] * 1e6 for _ in range(asked.r)]
        entries.append({**facts, "n_prompt": rows, "n_gen": 0, "samples_ns": samples})
    if asked.n:  # the first new token is the prompt's
        samples = [bench.timings(1, asked.n + 1)["predicted_ms"] * 1e6 for _ in range(asked.r)]
        entries.append({**facts, "n_prompt": 0, "n_gen": asked.n, "samples_ns": samples})
    return entries


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "w")  # llama.cpp's own lines go to stderr
    os.dup2(2, 1)
    print(to_json(measure(parse())), file=answer, flush=True)
    sys.exit(0)
