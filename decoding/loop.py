"""The loop from prompts to texts: draft, verify, accept, repeat. One text is a loop of one lane.

With a lone root as its tree and no drafter, the same loop is autoregressive decoding: one set of stopping rules, one
token counter and one clock for both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from backbone.cache import BatchCache, KVCache
from decoding.drafter import ChainDrafter, StepDrafter
from decoding.rules import Rule
from decoding.text import Text
from decoding.tree import DynamicTree, Tree
from ops.row_plan import RowPlan
from runtime.interrupt import check_interrupt


@dataclass
class Timers:
    """Seconds by stage; the stages add up to ``total_s``, the wall clock of the call.

    prefill_s: the backbone over the prompt. draft_s: the head, its ``begin`` over newly accepted rows (first the
    prompt's) included. verify_s: the backbone over the tree, until the host has what the rule reads of it. accept_s:
    choosing the path. cache_s: keeping its rows. host_s: everything else.
    """

    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    accept_s: float = 0.0
    cache_s: float = 0.0
    host_s: float = 0.0
    total_s: float = 0.0


class Clock:
    """Books the time since the last reading on a stage. Each stage ends with a read of its result on the host, which
    waits for the device."""

    def __init__(self):
        self.timers = Timers()
        self._start = self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Book the time since the last lap on ``stage``, a field of Timers."""
        now = time.perf_counter()
        setattr(self.timers, stage, getattr(self.timers, stage) + now - self._last)
        self._last = now

    def stop(self) -> Timers:
        """Book the rest on the host and close the total."""
        self.lap("host_s")
        self.timers.total_s = self._last - self._start
        return self.timers


@dataclass
class Generation:
    """A decoded text. Tokens are counted the same way for every head and for autoregressive decoding.

    token_ids: the new tokens; the first is the prefill's, every other one was emitted by a pass. A stop token, or the
    token that completes a stop string, is the last one. text: the decoded tokens, cut before a stop string; None
    without a tokenizer. finish_reason: "stop", "length" (max_new_tokens) or "cache" (no room for another row).
    num_passes: backbone passes after the prefill. accepted_per_pass: tokens each pass added to the text.
    reached_by_depth[d]: passes that accepted a node at depth d which has children (depth 0 is the root);
    accepted_by_depth[d]: those of them that accepted one of its children, at depth d + 1. Both count what verification
    accepted, also where the text ended inside the path. total_variation: the rule's, summed over all tokens that
    passes emitted, those past the end of the text too; None for a rule that is exact.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: str
    prompt_tokens: int
    num_passes: int = 0
    accepted_per_pass: list[int] = field(default_factory=list)
    reached_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    timers: Timers = field(default_factory=Timers)
    total_variation: float | None = None

    @property
    def accept_length(self) -> float | None:
        """Tokens per pass, the bonus token included and the prefill's token left out; None without a pass."""
        return (len(self.token_ids) - 1) / self.num_passes if self.num_passes else None


class Lane:
    """One text while it is decoded. drafter: None drafts nothing, and ``tree`` is then a lone root."""

    def __init__(
        self,
        number: int,
        prompt: np.ndarray,
        text: Text,
        rule: Rule,
        tree: Tree | DynamicTree,
        drafter: StepDrafter | ChainDrafter | None,
    ):
        self.number, self.prompt, self.text, self.rule = number, prompt, text, rule
        self.tree, self.drafter, self.depth = tree, drafter, tree.depth
        self.accepted_per_pass: list[int] = []
        self.ends: list[tuple[int, bool]] = []  # per pass: depth of the last accepted node, whether it has children

    def begin(self, output, root: int) -> None:
        """Take the prompt's pass and the token chosen after it."""
        self.root = root
        self.text.add([root])
        if self.drafter:
            self.drafter.begin(output, self.prompt, root)

    def has_ended(self, room: int) -> bool:
        """Whether the text is over, also because not one row fits. Where the tree no longer fits into ``room`` rows,
        the rest is decoded without a drafter."""
        if self.text.finish_reason is None and room < self.tree.num_nodes:
            self.tree, self.drafter = Tree.autoregressive(), None
            if room < 1:
                self.text.finish_reason = "cache"
        return self.text.finish_reason is not None

    def draft(self) -> None:
        """Fill the tree of this pass. ids: its tokens as the backbone takes them, (1, nodes)."""
        if self.drafter:
            self.drawn, self.tokens, self.ids, self.drawn_from = self.drafter.draft(self.root)
        else:
            self.drawn, self.tokens, self.drawn_from = self.tree, np.array([self.root], np.int32), None
            self.ids = self.tokens[None]

    def accept(self, rows: np.ndarray) -> None:
        """Choose the path of this pass, (accepted + 1,) int32. rows: what the rule read of this lane's rows."""
        self.path, self.root = self.rule.accept(self.drawn, self.tokens, rows, self.drawn_from)

    def add(self, output, first: int) -> None:
        """Take the accepted tokens, and their features, from the pass whose row ``first`` is this lane's root."""
        path = self.path
        self.ends.append((len(path) - 1, self.drawn.has_children[path[-1]]))
        following = [*self.tokens[path[1:]].tolist(), self.root]
        self.accepted_per_pass.append(self.text.add(following))
        if self.drafter:
            self.drafter.accept(output, path + np.int32(first) if first else path, following)

    def generation(self, timers: Timers) -> Generation:
        """What the text came to."""
        return Generation(
            self.text.token_ids,
            self.text.decode(),
            self.text.finish_reason,
            len(self.prompt),
            len(self.ends),
            self.accepted_per_pass,
            *count_depths(self.ends, self.depth),
            timers,
            self.rule.total_variation,
        )


class OneLane:
    """The passes of a single text, in a KVCache, which is emptied first; None: a new one of ``max_length`` rows."""

    def __init__(self, backbone, cache: KVCache | None, num_lanes: int, max_length: int):
        self.backbone, self.cache = backbone, backbone.new_cache(max_length) if cache is None else cache
        self.cache.rewind(0)

    def room(self, lane: Lane) -> int:
        """Rows that the lane can still take."""
        return self.cache.room

    def prefill(self, lane: Lane, layers):
        """The prompt's pass."""
        return self.backbone.forward(lane.prompt[None], cache=self.cache, layers=layers, logits="last")

    def verify(self, lanes: Sequence[Lane], layers):
        """One pass over the drafts of all lanes, their rows in this order."""
        return self.backbone.forward(lanes[0].ids, cache=self.cache, attend=lanes[0].drawn.plan, layers=layers)

    def commit(self, paths: Sequence[np.ndarray]) -> None:
        """Keep the accepted rows of the last pass."""
        self.cache.commit(paths[0])

    def settle(self, lanes: Sequence[Lane]) -> None:
        """Leave the rows of the prompt and of the text but for its last token, however the loop ended."""
        lane = lanes[0]
        self.cache.rewind(min(self.cache.length, len(lane.prompt) + max(len(lane.text.token_ids), 1) - 1))


class ManyLanes:
    """The same for several texts, each in a lane of a BatchCache."""

    def __init__(self, backbone, cache: BatchCache | None, num_lanes: int, max_length: int):
        if cache is not None and len(cache.lengths) < num_lanes:
            raise ValueError(f"the cache has {len(cache.lengths)} lanes, there are {num_lanes} prompts")
        self.backbone, self.cache = backbone, cache
        if cache is None:
            self.cache = BatchCache(backbone.config, num_lanes, max_length, backbone.dtype)
        self.cache.clear()

    def room(self, lane: Lane) -> int:
        return self.cache.room(lane.number)

    def prefill(self, lane: Lane, layers):
        plan = self.cache.plan([lane.number], [RowPlan.chain(len(lane.prompt))])
        slots = self.cache.slots
        return self.backbone.forward(lane.prompt[None], cache=slots, attend=plan, layers=layers, logits="last")

    def verify(self, lanes: Sequence[Lane], layers):
        plan = self.cache.plan([lane.number for lane in lanes], [lane.drawn.plan for lane in lanes])
        ids = np.concatenate([lane.tokens for lane in lanes])[None]
        return self.backbone.forward(ids, cache=self.cache.slots, attend=plan, layers=layers)

    def commit(self, paths: Sequence[np.ndarray]) -> None:
        self.cache.commit(paths)

    def settle(self, lanes: Sequence[Lane]) -> None:
        """Nothing: the lanes of a batch are emptied before the next one."""


def decode(lanes: Sequence[Lane], passes: OneLane | ManyLanes, clock: Clock) -> None:
    """Decode until every text has ended. The rules of all lanes are of one kind. A text that has ended leaves."""
    read, layers = lanes[0].rule.read, lanes[0].drafter.layers if lanes[0].drafter else ()
    clock.lap("host_s")
    for lane in lanes:
        lane.rule.start()
        output = passes.prefill(lane, layers)
        root = lane.rule.choose(read(output)[0])
        passes.commit([np.arange(len(lane.prompt))])
        clock.lap("prefill_s")
        lane.begin(output, root)
    while True:
        # Every step counts here: a pass of a small backbone takes a tenth of a millisecond.
        ended, drafting = False, False
        for lane in lanes:
            ended |= lane.has_ended(passes.room(lane))
            drafting |= lane.drafter is not None
        if ended:
            lanes = [lane for lane in lanes if lane.text.finish_reason is None]
            if not lanes:
                return
        check_interrupt()
        clock.lap("host_s")
        for lane in lanes:
            lane.draft()
        if drafting:
            clock.lap("draft_s")
        output = passes.verify(lanes, layers if drafting else ())
        rows = read(output)
        clock.lap("verify_s")
        first = 0
        for lane in lanes:
            lane.accept(rows[first : first + len(lane.tokens)])
            first += len(lane.tokens)
        clock.lap("accept_s")
        passes.commit([lane.path for lane in lanes])
        clock.lap("cache_s")
        first = 0
        for lane in lanes:
            lane.add(output, first)
            first += len(lane.tokens)


def count_depths(ends: Sequence[tuple[int, bool]], depth: int) -> tuple[list[int], list[int]]:
    """(reached_by_depth, accepted_by_depth), each ``depth`` long, from where the path of each pass ended.

    ends: (depth of the last accepted node, whether it has children). Worked example, depth 2: a pass that accepts
    nothing (0, True), one that ends on a leaf at depth 1 (1, False) and one that ends at depth 1 on a node with
    children (1, True) reach depth 0's children 3 times and depth 1's once; accepted are 2 and 0.
    """
    reached, accepted = [0] * depth, [0] * depth
    for last, has_children in ends:
        for d in range(last):
            reached[d] += 1
            accepted[d] += 1
        if has_children:
            reached[last] += 1
    return reached, accepted
