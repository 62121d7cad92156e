"""What 8 or 4 bits change in a backbone: perplexity on held-out replies, and agreement of its greedy text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from backbone.model import Backbone
from bench.measure.attempts import BASELINE, Conversation, Setup, usable_prompts
from bench.record.prompts import Prompt
from bench.record.schema import Quantization
from decoding.generate import first_difference
from decoding.tree import Tree
from ops.packing.quantize import BITS
from ops.row_plan import RowPlan
from ops.training import cross_entropy
from runtime import jt
from runtime.interrupt import check_interrupt
from trainer.config import TrainConfig
from trainer.data.splits import split_text
from trainer.data.tokens import TokenizedData, batches

SCORED_TOKENS = 2048  # per pass


def perplexity(backbone: Backbone, data: TokenizedData) -> float:
    """exp of the mean nats of the assistant's tokens, each after the complete conversation before it."""
    nats, count = 0.0, 0
    with jt.no_grad():
        for indices in batches(data, SCORED_TOKENS):
            part = data.select(indices)
            plan = RowPlan.sequences(part.lengths)
            logits = backbone.forward(part.token_ids[None], attend=plan).logits[0]
            labeled = np.append(part.mask[1:], False)
            labeled[part.offsets[1:] - 1] = False  # nothing follows the last row of a conversation
            rows = np.flatnonzero(labeled).astype(np.int32)
            losses, _ = cross_entropy(logits[jt.array(rows)], jt.array(part.token_ids[rows + 1]))
            nats, count = nats + float(losses.numpy().astype(np.float64).sum()), count + len(rows)
            check_interrupt()
    return math.exp(nats / count)


def greedy_texts(setup: Setup, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The tokens of the first reply to each prompt that can be decoded."""
    texts = []
    for prompt in usable_prompts(setup, prompts)[0]:
        texts.append(setup.decode(Conversation(setup, prompt, 0).ask(0), BASELINE).token_ids)
        check_interrupt()
    return texts


def layer_bytes(backbone: Backbone) -> int:
    """Bytes of the layers' weights, scales and norms included."""
    return sum(int(each.numel()) * each.dtype.dsize() for block in backbone.blocks for each in block.inputs)


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> tuple[float | None, float | None]:
    """The share of texts that are equal, and the share of ``ours``' tokens before the first difference.

    Worked example: [1 2 3] against [1 2 4] and [5] against [5]: half the texts, 3 of 4 tokens.
    """
    differences = [first_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    tokens = sum(map(len, ours))
    same = sum(len(a) if at is None else min(at, len(a)) for a, at in zip(ours, differences, strict=True))
    if not ours or not tokens:
        return None, None
    return sum(at is None for at in differences) / len(ours), same / tokens


def compare_backbones(original: Setup, quantized: Setup, prompts: Sequence[Prompt]) -> Quantization:
    """Compare both on the same held-out text and the same prompts."""
    original, quantized = (replace(each, head=None, tree=Tree.autoregressive()) for each in (original, quantized))
    data = split_text(TrainConfig(), original.tokenizer, original.backbone.config.max_positions).held_out
    greedy, tokens = agreement(greedy_texts(original, prompts), greedy_texts(quantized, prompts))
    return Quantization(
        bits=BITS[quantized.backbone.storage],
        layer_bytes_before=layer_bytes(original.backbone),
        layer_bytes_after=layer_bytes(quantized.backbone),
        perplexity_before=perplexity(original.backbone, data),
        perplexity_after=perplexity(quantized.backbone, data),
        greedy_agreement=greedy,
        token_agreement=tokens,
    )
