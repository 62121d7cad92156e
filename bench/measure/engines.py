"""Compares our engine with transformers on torch, for ``bench/hybrid.py``: the same head, the same prompts.

Prompts are decoded by both engines in turns, so that a machine that grows busier favors neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbone.engines import ENGINES, JITTOR, TORCH
from backbone.options import BackboneOptions
from bench.measure.options import PromptOptions
from bench.measure.session import read_backbone
from bench.record.files import project_path
from bench.record.metrics import aggregate
from bench.record.prompts import Prompt, PromptSet
from bench.tables.terminal import note
from decoding.options import DEFAULT_NODES, DecodingOptions
from runtime.options import option

if TYPE_CHECKING:
    from bench.measure.attempts import Attempt, Conversation, Setup
    from bench.measure.side_by_side import Measurement

WAYS = {"autoregressive": "baseline", "head": "head"}  # how a record names the sides of an attempt


@dataclass
class HybridOptions(BackboneOptions, PromptOptions, DecodingOptions):
    """The options of bench/hybrid.py, with its own defaults of some."""

    SHOWN = ("checkpoint", "backbone", "dtype", "template", "prompts", "num_prompts", "max_new_tokens", "nodes", "out")

    dtype: str = option("float32", "of the backbone's weights", choices=("float16", "float32"))
    nodes: int = option(DEFAULT_NODES, "tree budget, root included", metavar="N", least=1)
    checkpoint: str | None = option(None, "the head to decode with (required)", metavar="DIR")
    out: str | None = option(None, "where the JSON goes", metavar="FILE")

    def check(self) -> None:
        """Raises ValueError without a checkpoint."""
        if not self.checkpoint:
            raise ValueError("--checkpoint is missing; it names the head to decode with")


@dataclass
class Side:
    """One engine. conversations: of each prompt, in the order of the prompts."""

    setup: Setup
    measured: Measurement
    conversations: list[Conversation] = field(default_factory=list)


def compare_engines(options: HybridOptions, prompts: PromptSet) -> dict[str, Any]:
    """Both engines over all prompts; the record, JSON-ready. Raises ValueError for a head that torch cannot serve."""
    import runtime
    from backbone.tokenizer import EMBEDDED
    from bench.measure.attempts import usable_prompts
    from bench.measure.side_by_side import Measurement
    from bench.measure.warmup import warm_up
    from heads.checkpoint import find_checkpoint
    from heads.checkpoint import read_config as read_head_config
    from runtime.interrupt import check_interrupt, deferred_interrupts

    config, tokenizer = read_backbone(options)
    directory = find_checkpoint(options.checkpoint)
    rows, sides = options.cache_rows(config.max_positions, options.nodes), {}
    for engine in (TORCH, JITTOR):
        tree = sides[TORCH].setup.tree if sides else None
        sides[engine] = Side(make_setup(engine, options, tokenizer, rows, directory, tree), Measurement())
    with deferred_interrupts():
        for engine in ENGINES:
            warm_up(sides[engine].setup)
        usable, failures = usable_prompts(sides[JITTOR].setup, prompts.prompts)
        for failure in failures:
            note(f"warning: prompt {failure.prompt_id} is left out: {failure.error}")
        if not usable:
            raise ValueError(f"no prompt could be decoded; {failures[0].prompt_id}: {failures[0].error}")
        prompts = dataclasses.replace(prompts, prompts=tuple(usable))
        for index, prompt in enumerate(prompts.prompts):
            for engine in ENGINES if index % 2 == 0 else ENGINES[::-1]:
                decode(sides[engine], prompt, index, head_first=index // 2 % 2 == 1)
            if (index + 1) % 10 == 0:
                note(f"{index + 1} of {len(prompts.prompts)} prompts")
            check_interrupt()
    attempts = ([talk.attempt for talk in sides[engine].conversations] for engine in ENGINES)
    agreement = compare_attempts([prompt.prompt_id for prompt in prompts.prompts], *attempts)
    if agreement["difference"]:
        add_logit_gaps(agreement["difference"], prompts, sides)
    return {
        "schema_version": 1,
        "kind": "hybrid",
        "config": {
            "backbone": {
                "path": project_path(options.backbone or EMBEDDED),
                "fingerprint": sides[TORCH].setup.backbone.fingerprint,
                "dtype": options.dtype,
            },
            "checkpoint": {"path": project_path(directory), "head": read_head_config(directory)["head"]},
            "tree": sides[TORCH].setup.tree.paths,
            "max_new_tokens": options.max_new_tokens,
        },
        "data": {"path": project_path(prompts.source), "sha256": prompts.sha256, "num_prompts": len(prompts.prompts)},
        "engines": {engine: figures(sides[engine]) for engine in ENGINES},
        "agreement": agreement,
        "provenance": runtime.provenance(0),
    }


def make_setup(engine: str, options: HybridOptions, tokenizer, rows: int, directory: Path, tree) -> Setup:
    """Backbone, head and cache of one engine. tree: None takes that of the checkpoint, or of its calibration."""
    from bench.measure.attempts import Setup
    from bench.measure.tree_choice import choose_tree
    from heads.checkpoint import load_head

    backbone = dataclasses.replace(options, backbone_engine=engine).load()
    head, config = load_head(directory, backbone)
    tree = tree or choose_tree(None, options.nodes, directory, config, head, "runs").tree
    return Setup(backbone, tokenizer, backbone.new_cache(rows), options.max_new_tokens, head=head, tree=tree)


def decode(side: Side, prompt: Prompt, index: int, head_first: bool) -> None:
    """All turns of a prompt; later ones read this engine's own replies."""
    from bench.measure.attempts import BASELINE, HEAD, Conversation
    from bench.measure.side_by_side import add_attempts

    conversation = Conversation(side.setup, prompt, index)
    while (ids := conversation.ask(len(conversation.attempt.head.generations))) is not None:
        ways = (HEAD, BASELINE) if head_first else (BASELINE, HEAD)
        conversation.take(ids, {way: side.setup.decode(ids, way) for way in ways})
    side.conversations.append(conversation)
    add_attempts(side.setup, prompt, [conversation.attempt], side.measured)


def compare_attempts(prompt_ids: Sequence[str], ours: Sequence[Attempt], theirs: Sequence[Attempt]) -> dict[str, Any]:
    """The prompts of which all turns are the same with both engines: without the head, with it, and in its passes too,
    which makes the accept length the same. prompt_ids: their names.

    ``difference``, the first one or None, names prompt, turn, way (autoregressive or head), position and both tokens,
    None if a text ended.
    """
    from decoding.generate import first_difference

    counts, difference = {"autoregressive": 0, "head": 0, "passes": 0}, None
    for name, *pair in zip(prompt_ids, ours, theirs, strict=True):
        for way, side in WAYS.items():
            texts = [[each.token_ids for each in getattr(attempt, side).generations] for attempt in pair]
            counts[way] += texts[0] == texts[1]
            if texts[0] != texts[1] and difference is None:
                turn = next(i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
                at = first_difference(*(text[turn] for text in texts))
                tokens = [text[turn][at] if at < len(text[turn]) else None for text in texts]
                difference = {"prompt_id": name, "turn": turn, "way": way, "position": at, "tokens": tokens}
        passes = [[each.num_passes for each in attempt.head.generations] for attempt in pair]
        counts["passes"] += passes[0] == passes[1]
    return {"prompts": len(prompt_ids), **counts, "difference": difference}


def figures(side: Side) -> dict[str, Any]:
    """What one engine measured. parity: prompts whose text with the head is the engine's own without it."""
    measured, backbone = side.measured, side.setup.backbone
    metrics = aggregate(measured.rows)[0]
    return {
        "storage": backbone.storage,
        "accept_length": metrics.accept_length,
        "accept_length_ci": metrics.accept_length_ci,
        "tokens_per_s": metrics.tokens_per_s,
        "autoregressive_tokens_per_s": measured.baseline.tokens_per_s,
        "speedup": metrics.speedup,
        "parity": measured.parity.identical,
        "dropped_turns": measured.dropped_turns,
    }


def add_logit_gaps(difference: dict[str, Any], prompts: PromptSet, sides: dict[str, Side]) -> None:
    """Add the gap between the two best logits there, by each engine on its own text."""
    from decoding.generate import logit_gap

    index = [prompt.prompt_id for prompt in prompts.prompts].index(difference["prompt_id"])
    turn, difference["logit_gap"] = difference["turn"], {}
    for engine in ENGINES:
        setup, talk = sides[engine].setup, sides[engine].conversations[index]
        prompt_ids = setup.tokenizer.encode_chat(talk.messages[: len(talk.prompt.opening()) + 2 * turn + 1])
        text = getattr(talk.attempt, WAYS[difference["way"]]).generations[turn].token_ids
        gap = logit_gap(setup.backbone, prompt_ids, text, difference["position"])
        difference["logit_gap"][engine] = gap
