"""How long the parts of a pass take on this machine, and how long passes take in the decoding loop."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.measure.attempts import ADAPTED, HEAD, Setup
from bench.measure.texts import GreedyText
from bench.measure.warmup import warm_up
from decoding.draft import draft
from decoding.drafter import accepted_features
from decoding.generate import Generation, Timers
from decoding.search import LatencyCurve
from decoding.tree import Tree, default_tree
from heads.base import Features, Head
from heads.chains import chain_of
from ops.select import argmax
from runtime import jt, warm
from runtime.interrupt import check_interrupt

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Nodes scored at a depth of a draft: one, a few, and about as many as the widest depth of a tree of 64 nodes.
WIDTHS = (1, 4, 16)
ROUNDS = 7  # every part is timed once a round, and the median over the rounds counts
WARM_RUNS = 3
PROBE = 8  # nodes of the tree whose passes show what is neither drafting nor verifying


def row_counts(max_nodes: int) -> list[int]:
    """The rows to time for trees of up to ``max_nodes`` nodes; the curve ends at the largest."""
    return [*(rows for rows in ROWS if rows < max_nodes), max_nodes]


def measure_curve(
    setup: Setup, context_ids: Sequence[int], max_nodes: int, probes: Sequence[GreedyText], rounds: int = ROUNDS
) -> LatencyCurve:
    """The latency curve after a text of these tokens. setup: with the head; its tree does not matter.

    probes: texts that are decoded to see what a pass takes besides drafting and verifying.
    """
    head, cache = setup.head, setup.cache
    context = np.array(context_ids[: cache.max_length - max_nodes], np.int32)
    rows = row_counts(max_nodes)
    widths = [width for width in ((1,) if head.parallel else WIDTHS) if width <= min(head.num_draftable, max_nodes)]
    head.eval()
    with jt.no_grad():
        cache.rewind(0)
        output = setup.decoder.forward(context[None], cache=cache, layers=head.layers, logits="last")
        root = int(argmax(output.logits[0]).numpy()[0])
        cache.commit(np.arange(len(context)))
        context_features = (
            Features(output.hidden, output.layers),
            jt.array(np.append(context[1:], root)[None].astype(np.int32)),
        )
        accepted = accepted_features(output, np.array([len(context) - 1], np.int32))
        depths = range(1, 1 + min(head.num_depths, max_nodes - 1))
        chains = [chain_of(head, depth, setup.draft_dtype) for depth in depths]
        verify, begin, drafts, one_call = [], [], [], []
        for number in range(rounds + 1):  # the first one warms up
            verify.append([_time_verification(setup, count) for count in rows])
            first, levels = _time_drafting(head, context_features, accepted, root, widths)
            begin.append(first)
            drafts.append(levels)
            if chains and all(chains):
                one_call.append([_time_chain(chain, accepted, root) for chain in chains])
            if number == 0:
                warm()
            check_interrupt()
        cache.rewind(0)
    rest, root_rest = _rest(setup, probes)
    levels = np.median(drafts[1:], axis=0)
    return LatencyCurve(
        context=len(context),
        rows=rows,
        verify_s=np.median(verify[1:], axis=0).tolist(),
        begin_s=max(0.0, float(np.median(begin[1:])) - float(levels[0, 0])),
        widths=widths,
        draft_s=levels.tolist(),
        rest_s=rest,
        root_rest_s=root_rest,
        chain_s=np.median(one_call[1:], axis=0).tolist() if one_call else None,
    )


def _time_verification(setup: Setup, num_rows: int) -> float:
    """Seconds of one pass over ``num_rows`` rows and its argmax; the cache does not change."""
    tree, tokens = default_tree(num_rows), np.zeros((1, num_rows), np.int32)

    def verify():
        output = setup.decoder.forward(tokens, cache=setup.cache, attend=tree.plan, layers=setup.head.layers)
        argmax(output.logits[0]).numpy()
        setup.cache.rewind(setup.cache.length)

    return _seconds(verify)


def _time_drafting(
    head: Head, context_features: tuple, accepted: Features, root: int, widths: Sequence[int]
) -> tuple[float, list[list[float]]]:
    """(seconds of ``begin`` with one row and a draft one deep, seconds by width and depth of drafts alone).

    context_features: the arguments of ``begin`` for the context. ``begin`` is computed when the first draft needs it.
    """
    following = jt.array(np.array([[root]], np.int32))
    state = head.begin(*context_features)

    def begin():
        nonlocal state
        state = head.begin(accepted, following, state)
        draft(head, state, root, Tree.chain(1))

    first, levels = _seconds(begin), []
    for width in widths:
        bundles = [bundle(width, depth) for depth in range(1, 1 + head.num_depths)]
        levels.append([_seconds(functools.partial(draft, head, state, root, tree)) for tree in bundles])
    return first, levels


def _time_chain(chain, accepted: Features, root: int) -> float:
    """Seconds of a chain in one call after an accepted row, until the host has its tokens."""
    return _seconds(lambda: chain(accepted.hidden, 0, root).numpy())


def _seconds(work: Callable[[], None]) -> float:
    """Seconds that ``work`` takes right after itself, so that its weights are cached as in the decoding loop: the
    median of WARM_RUNS runs, after as many that are not counted."""
    seconds = []
    for _ in range(2 * WARM_RUNS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[WARM_RUNS:]))


def bundle(width: int, depth: int) -> Tree:
    """``width`` chains side by side below the root: a draft of it scores the root, then ``width`` nodes a depth.

    Worked example: bundle(2, 2) has the paths [0], [1], [0, 0], [1, 0].
    """
    return Tree.from_paths([(rank, *(0,) * below) for rank in range(width) for below in range(depth)])


def _rest(setup: Setup, probes: Sequence[GreedyText]) -> tuple[float, float]:
    """Seconds of a pass that are neither drafting nor verifying: (with a tree, without)."""
    tree = default_tree(min(PROBE, setup.cache.max_length - 1), setup.head.num_depths)
    drafting = dataclasses.replace(setup, tree=tree)
    warm_up(drafting)
    per_pass = []
    for decoder, side in ((drafting, HEAD), (setup, ADAPTED)):
        given = [decoder.decode(text.prompt_ids, side) for text in probes]
        passes = sum(generation.num_passes for generation in given)
        per_pass.append(sum(rest_s(generation.timers) for generation in given) / max(passes, 1))
    return per_pass[0], per_pass[1]


def rest_s(timers: Timers) -> float:
    """Seconds of decoding that are neither drafting nor verifying."""
    return timers.total_s - timers.prefill_s - timers.draft_s - timers.verify_s


# The loop ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoopTime:
    """One way to decode some texts. seconds, passes: by text, of the repeat with the median seconds."""

    seconds: list[float]
    passes: list[int]

    @property
    def seconds_per_pass(self) -> float:
        """Of all texts together."""
        return sum(self.seconds) / sum(self.passes)


def time_loops(
    setup: Setup, trees: Sequence[Tree], texts: Sequence[GreedyText], repeats: int, on_text: Callable[[], None]
) -> tuple[list[LoopTime], LoopTime]:
    """Decode the texts' prompts with each tree and autoregressively, in turn; returns (of each tree, of the baseline).

    The order rotates by one from text to text and from repeat to repeat, so that a machine that grows warmer or busier
    favors none. on_text: called after each text.
    """
    ways = [*(dataclasses.replace(setup, tree=tree) for tree in trees), None]
    for way in ways[:-1]:
        warm_up(way)
    warm()
    given: list[list[list[Generation]]] = [[] for _ in ways]
    for number, text in enumerate(texts):
        taken: list[list[Generation]] = [[] for _ in ways]
        for repeat in range(repeats):
            for turn in range(len(ways)):
                index = (turn + number + repeat) % len(ways)
                way = ways[index]
                decoder, side = (setup, ADAPTED) if way is None else (way, HEAD)
                taken[index].append(decoder.decode(text.prompt_ids, side))
        for way, generations in zip(given, taken, strict=True):
            way.append(generations)
        on_text()
        check_interrupt()
    times = [_loop_time(generations) for generations in given]
    return times[:-1], times[-1]


def _loop_time(generations: Sequence[Sequence[Generation]]) -> LoopTime:
    """generations: by text, then by repeat."""
    middle = [sorted(each, key=_decoding_s)[(len(each) - 1) // 2] for each in generations]
    return LoopTime([_decoding_s(each) for each in middle], [each.num_passes for each in middle])


def _decoding_s(generation: Generation) -> float:
    return generation.timers.total_s - generation.timers.prefill_s
