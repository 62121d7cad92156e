"""From a prompt to text: draft, verify, accept, repeat.

``generate`` and its autoregressive twin are one loop with one set of stopping rules, one token counter and one clock;
the twin's tree is a lone root and it has no head, so it does not pay for drafting.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from decoding.drafter import make_drafter
from decoding.dynamic import check_shape
from decoding.rules import Greedy, Rule
from decoding.text import Text
from decoding.tree import DynamicTree, Tree
from ops.select import top_k
from runtime import jt
from runtime.interrupt import check_interrupt

OnTokens = Callable[[list[int]], None]


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
    """Books the time since the last reading on a stage. What a stage computed must be on the host by then: the
    stages end with a read of their result, which waits for the device."""

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
    """What one call gave. Tokens are counted one way for every head and for the autoregressive twin.

    token_ids: the new tokens; the first is the prefill's, every other one a pass emitted. A stop token, or the token
    that completes a stop string, is the last one. text: the decoded tokens, cut before a stop string; None without a
    tokenizer. finish_reason: "stop", "length" (max_new_tokens) or "cache" (no room for another row). num_passes:
    backbone passes, the prefill not among them. accepted_per_pass: tokens each pass added to the text.
    reached_by_depth[d]: passes that accepted a node at depth d which has children (depth 0 is the root);
    accepted_by_depth[d]: those of them that accepted one of its children, at depth d + 1. Both count what verification
    accepted, also where the text ended inside the path. total_variation: the rule's, summed over all tokens that passes
    emitted, ``num_emitted``; None for a rule that is exact.
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
    def num_emitted(self) -> int:
        """Tokens that the passes emitted, those past the end of the text too."""
        return self.num_passes + sum(self.accepted_by_depth)

    @property
    def accept_length(self) -> float | None:
        """Tokens per backbone pass, the bonus token included; the prefill and its token are left out. None: no pass."""
        return (len(self.token_ids) - 1) / self.num_passes if self.num_passes else None


def generate(
    backbone,
    head,
    prompt_ids: Sequence[int],
    tree: Tree | DynamicTree,
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    stop_strings: Iterable[str] = (),
    tokenizer=None,
    on_tokens: OnTokens | None = None,
    cache=None,
    rule: Rule | None = None,
    draft_dtype: str = "float16",
) -> Generation:
    """Tree decoding: the text of ``generate_autoregressive``, several tokens a backbone pass.

    tree: a Tree, or a DynamicTree that every pass shapes anew. rule: how tokens are chosen, see ``decoding.rules``;
    None: greedily. With ``Lossless`` the text is not the twin's but drawn from the same distribution; the same rule,
    prompt and tree give the same text again.
    on_tokens: called with the new tokens after the prefill and after each pass, never with any past the end of the
    text. cache: a KVCache to use instead of a new one; it is emptied first, and when the call ends, also by an
    exception, it holds the prompt and all tokens of the text so far but the last. When the tree no longer fits into
    the cache, the rest is decoded without a head. The head drafts in evaluation mode and without gradients.
    draft_dtype: of the copy of the head's matrices that drafts where the tree is a chain and the head can draft one in
    one call (``Head.chain``); what is drafted may change with it, and the text does not.

    Raises ValueError for a tree that the head cannot fill, an empty prompt, tokens outside the vocabulary, a prompt
    longer than the cache, max_new_tokens < 1, and stop strings that are empty or come without a tokenizer.
    """
    clock = Clock()
    rule = rule or Greedy()
    check_shape(tree, head, rule)
    text = Text(max_new_tokens, stop_ids, stop_strings, tokenizer, on_tokens)
    with evaluating(head):
        drafter = make_drafter(head, tree, rule, draft_dtype) if tree.depth else None
        return _decode(backbone, drafter, prompt_ids, tree, text, cache, clock, rule)


def generate_autoregressive(
    backbone,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int] = (),
    stop_strings: Iterable[str] = (),
    tokenizer=None,
    on_tokens: OnTokens | None = None,
    cache=None,
    rule: Rule | None = None,
) -> Generation:
    """One token a backbone pass, the most probable or, by ``rule``, drawn: the twin that every head is compared with.
    See ``generate``."""
    clock = Clock()
    text = Text(max_new_tokens, stop_ids, stop_strings, tokenizer, on_tokens)
    return _decode(backbone, None, prompt_ids, Tree.autoregressive(), text, cache, clock, rule or Greedy())


def _decode(backbone, drafter, prompt_ids, tree: Tree, text: Text, cache, clock: Clock, rule: Rule) -> Generation:
    """The loop. drafter: None drafts nothing, and the tree is then a lone root."""
    prompt, cache = _prepare(backbone, prompt_ids, tree, text, cache)
    accepted_per_pass: list[int] = []
    ends: list[tuple[int, bool]] = []  # per pass: the depth of the last accepted node, and whether it has children
    depth, layers = tree.depth, drafter.layers if drafter else ()
    rule.start()
    with jt.no_grad(), consistent(cache, len(prompt), text):
        clock.lap("host_s")
        output = backbone.forward(prompt[None], cache=cache, layers=layers, logits="last")
        root = rule.choose(rule.read(output)[0])
        cache.commit(np.arange(len(prompt)))
        clock.lap("prefill_s")
        text.add([root])
        if drafter:
            drafter.begin(output, prompt, root)
        while text.finish_reason is None:
            check_interrupt()
            if cache.room < tree.num_nodes:
                tree, drafter, layers = Tree.autoregressive(), None, ()
            if cache.room < tree.num_nodes:
                text.finish_reason = "cache"
                break
            clock.lap("host_s")
            if drafter:
                drawn, tokens, ids, drawn_from = drafter.draft(root)
                clock.lap("draft_s")
            else:
                drawn, tokens, drawn_from = Tree.autoregressive(), np.array([root], np.int32), None
                ids = tokens[None]
            output = backbone.forward(ids, cache=cache, attend=drawn.plan, layers=layers)
            rows = rule.read(output)
            clock.lap("verify_s")
            path, root = rule.accept(drawn, tokens, rows, drawn_from)
            clock.lap("accept_s")
            cache.commit(path)
            clock.lap("cache_s")
            ends.append((len(path) - 1, drawn.has_children[path[-1]]))
            following = [*tokens[path[1:]].tolist(), root]
            accepted_per_pass.append(text.add(following))
            if drafter:
                drafter.accept(output, path, following)
    reached, accepted = count_depths(ends, depth)
    result = Generation(text.token_ids, text.decode(), text.finish_reason, len(prompt), len(ends), accepted_per_pass)
    result.reached_by_depth, result.accepted_by_depth, result.timers = reached, accepted, clock.stop()
    result.total_variation = rule.total_variation
    return result


def _prepare(backbone, prompt_ids, tree: Tree, text: Text, cache):
    """The checked prompt, (tokens,) int32, and an empty cache for it. ValueError for a prompt that cannot be read."""
    prompt = np.asarray(prompt_ids, np.int64).reshape(-1)
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; pass at least one token")
    vocab_size = backbone.config.vocab_size
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(f"the prompt holds tokens {prompt.min()} to {prompt.max()}, expected 0 to {vocab_size - 1}")
    wanted = len(prompt) + text.max_new_tokens + tree.num_nodes
    max_length = cache.max_length if cache is not None else min(wanted, backbone.config.max_positions)
    if len(prompt) > max_length:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the cache {max_length} rows; shorten the prompt")
    if cache is None:
        cache = backbone.new_cache(max_length)
    cache.rewind(0)
    return prompt.astype(np.int32), cache


@contextlib.contextmanager
def evaluating(head):
    """The head in evaluation mode; a head that was training goes on training afterwards."""
    training = head.is_training()
    if training:
        head.eval()
    try:
        yield
    finally:
        if training:
            head.train()


@contextlib.contextmanager
def consistent(cache, prompt_tokens: int, text: Text):
    """Leave the cache, however the loop ends, with the rows of the prompt and of the text but for its last token."""
    try:
        yield
    finally:
        cache.rewind(min(cache.length, prompt_tokens + max(len(text.token_ids), 1) - 1))


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


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which two token lists differ; the shorter one's length where it begins the longer one; None
    when they are equal."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def logit_gap(backbone, prompt_ids: Sequence[int], token_ids: Sequence[int], position: int) -> float:
    """How close the backbone's two best logits are where ``token_ids[position]`` was chosen; for parity reports.

    Runs the prompt and ``token_ids[:position]`` in one pass. Raises ValueError for a position outside the text (its
    length is allowed: the token that would come next) and for an empty prompt.
    """
    if not 0 <= position <= len(token_ids) or len(prompt_ids) == 0:
        raise ValueError(f"position {position} is not within the {len(token_ids)} tokens behind a prompt")
    rows = np.array([*prompt_ids, *token_ids[:position]], np.int32)
    with jt.no_grad():
        values = top_k(backbone.forward(rows[None], logits="last").logits[0], 2)[0].numpy()
    return float(values[0, 0] - values[0, 1])
