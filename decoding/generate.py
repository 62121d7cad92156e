"""From prompts to texts: ``generate`` with a head, ``generate_autoregressive`` without one, and ``generate_batch``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from backbone.cache import BatchCache, KVCache
from decoding.drafter import make_drafter
from decoding.dynamic import check_shape
from decoding.loop import Clock, Generation, Lane, ManyLanes, OneLane, Timers, decode
from decoding.rules import Greedy, Rule
from decoding.text import Text
from decoding.tree import DynamicTree, Tree
from ops.select import top_k
from runtime import jt

__all__ = [
    "Generation",
    "Timers",
    "first_difference",
    "generate",
    "generate_autoregressive",
    "generate_batch",
    "logit_gap",
]


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
    on_tokens: Callable[[list[int]], None] | None = None,
    cache: KVCache | None = None,
    rule: Rule | None = None,
    draft_dtype: str = "float16",
) -> Generation:
    """Tree decoding: the text of ``generate_autoregressive``, several tokens a backbone pass.

    head: None decodes autoregressively, whatever the tree. tree: a Tree, or a DynamicTree, which every pass shapes.
    rule: how tokens are chosen, see ``decoding.rules``; None: greedily. With ``Lossless`` the text is not the
    baseline's but drawn from the same distribution; the same rule, prompt and tree give the same text again.
    on_tokens: called with the new tokens after the prefill and after each pass, never with any past the end of the
    text. cache: a KVCache to use instead of a new one; it is emptied first, and when the call ends, also by an
    exception, it holds the prompt and all tokens of the text so far but the last. When the tree no longer fits into
    the cache, the rest is decoded without a head. The head drafts in evaluation mode and without gradients.
    draft_dtype: of the matrices of a chain that is drafted in one call (``heads.chains``); it may change what is
    drafted, never the text.

    Raises ValueError for a tree that the head cannot fill, an empty prompt, tokens outside the vocabulary, a prompt
    longer than the cache, max_new_tokens < 1, and stop strings that are empty or come without a tokenizer.
    """
    text = Text(max_new_tokens, stop_ids, stop_strings, tokenizer, on_tokens)
    return _generate(backbone, head, [prompt_ids], tree, [text], [rule or Greedy()], cache, draft_dtype, OneLane)[0]


def generate_autoregressive(backbone, prompt_ids: Sequence[int], *, max_new_tokens: int, **settings) -> Generation:
    """One token a backbone pass, the most probable or, by ``rule``, drawn: the baseline of every head.

    settings: those of ``generate`` from ``stop_ids`` to ``rule``.
    """
    return generate(backbone, None, prompt_ids, Tree.autoregressive(), max_new_tokens=max_new_tokens, **settings)


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
    """``generate`` for several prompts in shared passes: each gets the tokens that it gets alone, bit for bit, because
    a row of the backbone is bitwise the same whatever rows run beside it.

    cache: a BatchCache with at least one lane per prompt, to use instead of a new one with room for the longest text,
    at most the backbone's positions; it is emptied first. rules: one per prompt; default: greedy. Each text drafts for
    itself, and a text that has ended leaves the batch. The timers of every Generation are those of the whole batch.

    Raises ValueError as ``generate`` does, naming the prompt by its number, and for no prompts at all.
    """
    rules = list(rules) if rules is not None else [Greedy() for _ in prompts]
    if len(rules) != len(prompts) or len(prompts) == 0:
        raise ValueError(f"a batch needs prompts and a rule for each, got {len(prompts)} and {len(rules)}")
    if len({type(rule) for rule in rules}) > 1:
        raise ValueError("the texts of a batch are decoded by rules of one kind; only their settings may differ")
    stop_ids, stop_strings = list(stop_ids), list(stop_strings)
    texts = [Text(max_new_tokens, stop_ids, stop_strings, tokenizer) for _ in prompts]
    return _generate(backbone, head, prompts, tree, texts, rules, cache, draft_dtype, ManyLanes)


def _generate(
    backbone, head, prompts, tree, texts, rules, cache, draft_dtype: str, kind: type[OneLane | ManyLanes]
) -> list[Generation]:
    """Decode one text in a KVCache, or several in a BatchCache, as ``kind`` says."""
    clock = Clock()
    if head is None:
        tree = Tree.autoregressive()
    else:
        check_shape(tree, head, rules[0])
    names = ["the prompt"] if kind is OneLane else [f"prompt {number}" for number in range(len(prompts))]
    prompts = [_checked_prompt(backbone, ids, name) for ids, name in zip(prompts, names, strict=True)]
    longest = max(map(len, prompts)) + texts[0].max_new_tokens + tree.num_nodes
    max_length = cache.max_length if cache is not None else min(longest, backbone.config.max_positions)
    for prompt, name in zip(prompts, names, strict=True):
        if len(prompt) > max_length:
            raise ValueError(f"{name} has {len(prompt)} tokens, the cache {max_length} rows; shorten the prompt")
    passes = kind(backbone, cache, len(prompts), max_length)
    with jt.no_grad(), _evaluating(head):
        lanes = []
        for number, (prompt, text, rule) in enumerate(zip(prompts, texts, rules, strict=True)):
            drafter = make_drafter(head, tree, rule, draft_dtype) if tree.depth else None
            lanes.append(Lane(number, prompt, text, rule, tree, drafter))
        try:
            decode(lanes, passes, clock)
        finally:
            passes.settle(lanes)
    timers = clock.stop()
    return [lane.generation(timers) for lane in lanes]


def _checked_prompt(backbone, prompt_ids: Sequence[int], name: str) -> np.ndarray:
    """(tokens,) int32. ValueError naming a prompt that is empty or has tokens outside the vocabulary."""
    prompt, vocab_size = np.asarray(prompt_ids, np.int64).reshape(-1), backbone.config.vocab_size
    if len(prompt) == 0:
        raise ValueError(f"{name} is empty; pass at least one token")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(f"{name} holds tokens {prompt.min()} to {prompt.max()}, expected 0 to {vocab_size - 1}")
    return prompt.astype(np.int32)


@contextlib.contextmanager
def _evaluating(head) -> Iterator[None]:
    """The head in evaluation mode; afterwards in the mode it was in."""
    training = head is not None and head.is_training()
    if training:
        head.eval()
    try:
        yield
    finally:
        if training:
            head.train()


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which two token lists differ; the length of the shorter one where it is a prefix of the other;
    None when they are equal."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def logit_gap(backbone, prompt_ids: Sequence[int], token_ids: Sequence[int], position: int) -> float:
    """The gap between the backbone's two best logits where ``token_ids[position]`` was chosen; for parity reports.

    Runs the prompt and ``token_ids[:position]`` in one pass. Raises ValueError for an empty prompt and a position
    outside the text; the position after its last token is allowed.
    """
    if not 0 <= position <= len(token_ids) or len(prompt_ids) == 0:
        raise ValueError(f"position {position} is not within the {len(token_ids)} tokens after a prompt")
    rows = np.array([*prompt_ids, *token_ids[:position]], np.int32)
    with jt.no_grad():
        values = top_k(backbone.forward(rows[None], logits="last").logits[0], 2)[0].numpy()
    return float(values[0, 0] - values[0, 1])
