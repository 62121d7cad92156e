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
    from bench.measure.attempts import Setup
    from bench.measure.side_by_side import Measurement

SCHEMA_VERSION, KIND = 1, "hybrid"


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
class Turn:
    """One reply by one engine. baseline, head: token ids, without the head and with it; passes: those of the head."""

    prompt_ids: list[int]
    baseline: list[int]
    head: list[int]
    passes: int


@dataclass
class Side:
    """One engine. conversations: the turns of each prompt, in the order of the prompts."""

    setup: Setup
    measured: Measurement
    conversations: list[list[Turn]] = field(default_factory=list)


@dataclass(frozen=True)
class Agreement:
    """Prompts of which all turns are the same with both engines: without the head, with it, and in its passes too,
    which makes the accept length the same. difference: the first one, None without."""

    prompts: int
    autoregressive: int
    head: int
    passes: int
    difference: dict | None


def compare_engines(options: HybridOptions, prompts: PromptSet) -> dict[str, Any]:
    """Both engines over all prompts; the record, JSON-ready. Raises ValueError for a head that torch cannot serve."""
    import runtime
    from backbone.tokenizer import EMBEDDED
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
        for index, prompt in enumerate(prompts.prompts):
            for engine in ENGINES if index % 2 == 0 else ENGINES[::-1]:
                decode(sides[engine], prompt, index, head_first=index // 2 % 2 == 1)
            if (index + 1) % 10 == 0:
                note(f"{index + 1} of {len(prompts.prompts)} prompts")
            check_interrupt()
    ours, theirs = (sides[engine].conversations for engine in ENGINES)
    found = compare_conversations([prompt.prompt_id for prompt in prompts.prompts], ours, theirs)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
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
        "agreement": {**dataclasses.asdict(found), "difference": explain(found.difference, prompts, sides)},
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

    conversation, turns = Conversation(side.setup, prompt, index), []
    while (ids := conversation.ask(len(turns))) is not None:
        ways = (HEAD, BASELINE) if head_first else (BASELINE, HEAD)
        given = {way: side.setup.decode(ids, way) for way in ways}
        conversation.take(ids, given)
        head = given[HEAD]
        turns.append(Turn(ids, given[BASELINE].token_ids, head.token_ids, head.num_passes))
    side.conversations.append(turns)
    add_attempts(side.setup, prompt, [conversation.attempt], side.measured)


def compare_conversations(
    prompt_ids: Sequence[str], ours: Sequence[list[Turn]], theirs: Sequence[list[Turn]]
) -> Agreement:
    """Compare the conversations of two engines, prompt by prompt. prompt_ids: their names.

    ``difference`` names prompt, turn, way (autoregressive or head), position and both tokens, None if a text ended.
    """
    from decoding.generate import first_difference

    counts, difference = {"autoregressive": 0, "head": 0, "passes": 0}, None
    for name, mine, other in zip(prompt_ids, ours, theirs, strict=True):
        for way, read in (("autoregressive", lambda t: t.baseline), ("head", lambda t: t.head)):
            texts = [[read(turn) for turn in turns] for turns in (mine, other)]
            counts[way] += texts[0] == texts[1]
            if texts[0] != texts[1] and difference is None:
                turn = next(i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
                pair = [text[turn] for text in texts]
                at = first_difference(*pair)
                tokens = [text[at] if at < len(text) else None for text in pair]
                difference = {"prompt_id": name, "turn": turn, "way": way, "position": at, "tokens": tokens}
        counts["passes"] += [turn.passes for turn in mine] == [turn.passes for turn in other]
    return Agreement(len(prompt_ids), *counts.values(), difference)


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


def explain(difference: dict | None, prompts: PromptSet, sides: dict[str, Side]) -> dict | None:
    """The difference with the gap between the two best logits there, by each engine on its own text."""
    from decoding.generate import logit_gap

    if difference is None:
        return None
    index = [prompt.prompt_id for prompt in prompts.prompts].index(difference["prompt_id"])
    gaps = {}
    for engine in ENGINES:
        turn = sides[engine].conversations[index][difference["turn"]]
        text = turn.baseline if difference["way"] == "autoregressive" else turn.head
        gaps[engine] = logit_gap(sides[engine].setup.backbone, turn.prompt_ids, text, difference["position"])
    return {**difference, "logit_gap": gaps}
