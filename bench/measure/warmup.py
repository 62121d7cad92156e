"""Everything that compiles or loads a kernel, run before the clock starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from bench.measure.attempts import Setup
from decoding.drafter import make_drafter
from decoding.tree import Tree
from runtime import jt, synchronize, warm

# Prompt lengths of the warm-up: a single row has kernels of its own, two rows are the shortest text, forty a usual one.
WARM_LENGTHS = (1, 2, 40)
WARM_TOKENS = 8


def warm_up(setup: Setup) -> None:
    """Run every shape that a measurement uses, so that no kernel is compiled on the clock."""
    short = dataclasses.replace(setup, max_new_tokens=min(WARM_TOKENS, setup.max_new_tokens))
    for length in WARM_LENGTHS:
        prompt_ids = np.arange(min(length, setup.cache.max_length)) % setup.backbone.config.vocab_size
        for side in setup.sides:
            short.decode(prompt_ids, side, setup.acceptance.rule())
            if setup.batch_size > 1:
                rules = [setup.acceptance.rule() for _ in range(setup.batch_size)]
                short.decode_all([prompt_ids] * setup.batch_size, side, rules)
    if setup.tree.depth:
        warm_acceptance(setup)
    warm()


def warm_acceptance(setup: Setup) -> None:
    """Run what happens after drafts are accepted, which the warm-up's prompts may not cause: several rows are kept, not
    all adjacent, and the head continues from them."""
    head, cache, num_nodes = setup.head, setup.cache, setup.tree.num_nodes
    cache.rewind(0)
    with jt.no_grad():
        tokens, plan = np.zeros((1, num_nodes), np.int32), Tree.chain(num_nodes - 1).plan
        output = setup.decoder.forward(tokens, cache=cache, attend=plan, layers=head.layers)
        path = np.array([0, num_nodes - 1], np.int32)
        drafter = make_drafter(head, setup.tree, setup.acceptance.rule(), setup.draft_dtype)
        for rows in (path, path, path[:1]):
            drafter.accept(output, rows, [0] * len(rows))
            drafter.draft(0)
        cache.commit(path)
        synchronize()
    cache.rewind(0)


def loaded_kernels() -> int | None:
    """Kernels this process has compiled or read from Jittor's cache; None if the system does not list them."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return len({line.split()[-1] for line in maps.splitlines() if "/jit/" in line and line.endswith(".so")})


def kernels_since(before: int | None) -> int | None:
    """Kernels that this process has compiled or loaded since ``loaded_kernels`` gave ``before``. That count falls if
    another process compiles one of them again."""
    return None if before is None else max(0, loaded_kernels() - before)
