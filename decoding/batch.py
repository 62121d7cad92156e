"""Several prompts at once: one backbone pass serves all texts that go on, each with its own cache lane and tree.

A row of the backbone is bitwise the same whatever rows run beside it (on the CPU), so every text gets the tokens that
it gets alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import numpy as np

from backbone.cache import BatchCache
from decoding.drafter import make_drafter
from decoding.dynamic import check_shape
from decoding.generate import Clock, Generation, count_depths, evaluating
from decoding.rules import Greedy, Rule
from decoding.text import Text
from decoding.tree import DynamicTree, Tree
from ops.row_plan import RowPlan
from runtime import jt
from runtime.interrupt import check_interrupt


class Stream:
    """One text of a batch, and what its head knows of it. drafter: None drafts nothing."""

    def __init__(self, lane: int, prompt: np.ndarray, text: Text, rule: Rule, drafter, tree: Tree | DynamicTree):
        self.lane, self.prompt, self.text, self.rule = lane, prompt, text, rule
        self.drafter, self.tree, self.depth = drafter, tree, tree.depth
        self.drawn = self.tokens = self.drawn_from = None
        self.accepted_per_pass: list[int] = []
        self.ends: list[tuple[int, bool]] = []

    def begin(self, output, row: np.ndarray) -> None:
        """Take the prompt's pass. row: what the rule read of its last row."""
        self.root = self.rule.choose(row)
        self.text.add([self.root])
        if self.drafter:
            self.drafter.begin(output, self.prompt, self.root)

    def fit(self, room: int) -> bool:
        """Go on without a head where the tree no longer fits; False, and the text is over, where nothing does."""
        if room < self.tree.num_nodes:
            self.tree, self.drafter = Tree.autoregressive(), None
        if room < self.tree.num_nodes:
            self.text.finish_reason = "cache"
        return self.text.finish_reason is None

    def draft(self) -> None:
        """Fill the tree."""
        self.drawn, self.tokens, self.drawn_from = Tree.autoregressive(), np.array([self.root], np.int32), None
        if self.drafter:
            self.drawn, self.tokens, _, self.drawn_from = self.drafter.draft(self.root)

    def accept(self, rows: np.ndarray) -> np.ndarray:
        """The accepted path of this text's rows of a pass, (accepted + 1,) int32. rows: what the rule read of them."""
        path, self.root = self.rule.accept(self.drawn, self.tokens, rows, self.drawn_from)
        self.ends.append((len(path) - 1, self.drawn.has_children[path[-1]]))
        self.following = [*self.tokens[path[1:]].tolist(), self.root]
        return path

    def add(self, output, first: int, path: np.ndarray) -> None:
        """Take the accepted tokens, and their features, from the pass whose row ``first`` is this text's root."""
        self.accepted_per_pass.append(self.text.add(self.following))
        if self.drafter:
            self.drafter.accept(output, (first + path).astype(np.int32), self.following)

    def generation(self) -> Generation:
        """What the text came to; its timers are filled in by the batch."""
        reached, accepted = count_depths(self.ends, self.depth)
        text, passes = self.text, len(self.ends)
        result = Generation(
            text.token_ids, text.decode(), text.finish_reason, len(self.prompt), passes, self.accepted_per_pass
        )
        result.reached_by_depth, result.accepted_by_depth = reached, accepted
        result.total_variation = self.rule.total_variation
        return result


def generate_batch(
    backbone,
    head,
    prompts: Sequence[Sequence[int]],
    tree: Tree | DynamicTree,
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    stop_strings: Iterable[str] = (),
    tokenizer=None,
    cache: BatchCache | None = None,
    rules: Sequence[Rule] | None = None,
    draft_dtype: str = "float16",
) -> list[Generation]:
    """``decoding.generate.generate`` for several prompts: each gets the tokens that it gets alone, bit for bit.

    head: None decodes autoregressively. cache: a BatchCache with a lane for each prompt at least, to use instead of a
    new one with room for the longest text, at most the backbone's positions; it is emptied first. rules: one per
    prompt; default: greedy. draft_dtype: as ``generate`` takes it. The pass of the backbone is shared, each text drafts
    for itself, and a text that is over leaves the batch. The timers of every Generation are those of the whole batch.

    Raises ValueError as ``generate`` does, naming the prompt by its number, and for no prompts at all.
    """
    clock = Clock()
    rules = list(rules) if rules is not None else [Greedy() for _ in prompts]
    if len(rules) != len(prompts) or len(prompts) == 0:
        raise ValueError(f"a batch needs prompts and a rule for each, got {len(prompts)} and {len(rules)}")
    if len({type(rule) for rule in rules}) > 1:
        raise ValueError("the texts of a batch are decoded by rules of one kind; only their settings may differ")
    if head is None:
        tree = Tree.autoregressive()
    else:
        check_shape(tree, head, rules[0])
    arrays = [_checked(backbone, ids, number) for number, ids in enumerate(prompts)]
    wanted = max(map(len, arrays)) + max_new_tokens + tree.num_nodes
    max_length = cache.max_length if cache is not None else min(wanted, backbone.config.max_positions)
    if cache is not None and len(cache.lengths) < len(arrays):
        raise ValueError(f"the cache has {len(cache.lengths)} lanes, there are {len(arrays)} prompts")
    for number, ids in enumerate(arrays):
        if len(ids) > max_length:
            raise ValueError(f"prompt {number} has {len(ids)} tokens, its cache {max_length} rows; shorten it")
    stop_ids, stop_strings = list(stop_ids), list(stop_strings)
    if cache is None:
        cache = BatchCache(backbone.config, len(arrays), max_length, backbone.dtype)
    cache.clear()
    with jt.no_grad(), evaluating(head) if head else contextlib.nullcontext():
        streams = []
        for lane, (ids, rule) in enumerate(zip(arrays, rules, strict=True)):
            text = Text(max_new_tokens, stop_ids, stop_strings, tokenizer)
            drafter = make_drafter(head, tree, rule, draft_dtype) if tree.depth else None
            streams.append(Stream(lane, ids, text, rule, drafter, tree))
        _decode(backbone, streams, cache, clock)
    timers = clock.stop()
    generations = [stream.generation() for stream in streams]
    for each in generations:
        each.timers = timers
    return generations


def _checked(backbone, prompt_ids: Sequence[int], number: int) -> np.ndarray:
    prompt, vocab_size = np.asarray(prompt_ids, np.int64).reshape(-1), backbone.config.vocab_size
    if len(prompt) == 0:
        raise ValueError(f"prompt {number} is empty; pass at least one token")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(
            f"prompt {number} holds tokens {prompt.min()} to {prompt.max()}, expected 0 to {vocab_size - 1}"
        )
    return prompt.astype(np.int32)


def _decode(backbone, streams: list[Stream], cache: BatchCache, clock: Clock) -> None:
    """The loop over passes, until every text is over."""
    layers = streams[0].drafter.layers if streams[0].drafter else ()
    clock.lap("host_s")
    for stream in streams:
        stream.rule.start()
        plan = cache.plan([stream.lane], [RowPlan.chain(len(stream.prompt))])
        output = backbone.forward(stream.prompt[None], cache=cache.slots, attend=plan, layers=layers, logits="last")
        row = stream.rule.read(output)[0]
        cache.commit([np.arange(len(stream.prompt))])
        stream.begin(output, row)
    clock.lap("prefill_s")
    while True:
        check_interrupt()
        going = [s for s in streams if s.text.finish_reason is None and s.fit(cache.room(s.lane))]
        if not going:
            return
        clock.lap("host_s")
        for stream in going:
            stream.draft()
        clock.lap("draft_s")
        plan = cache.plan([s.lane for s in going], [s.drawn.plan for s in going])
        tokens = np.concatenate([s.tokens for s in going])
        output = backbone.forward(tokens[None], cache=cache.slots, attend=plan, layers=layers)
        rows = going[0].rule.read(output)
        clock.lap("verify_s")
        firsts = np.cumsum([0, *(len(s.tokens) for s in going)])
        paths = [s.accept(rows[first : first + len(s.tokens)]) for s, first in zip(going, firsts, strict=False)]
        clock.lap("accept_s")
        cache.commit(paths)
        clock.lap("cache_s")
        for stream, first, path in zip(going, firsts, paths, strict=False):
            stream.add(output, int(first), path)
