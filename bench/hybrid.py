"""Holds our engine against transformers on torch: the same checkpoint, the same prompts, greedily, in one process.

    python bench/hybrid.py --checkpoint runs/mlp/RUN --out results/hybrid.json

Prints a table and, as the last line, the JSON. The status is 0 when every text of both engines is the same, with the
head and without, and 1 when one differs; in float32 a difference means that one of them is wrong, or that two logits
lie closer than their rounding (the JSON says how close). Prompts are decoded by both in turns, so that a machine that
grows busier favours neither. Needs requirements-torch.txt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from backbone.engines import ENGINES, JITTOR, TORCH, load_engine, prepare_engine
from bench.compare import show_table
from bench.measure.options import DEFAULT_CACHE, DEFAULT_NODES, project_path, read_prompts
from bench.record.metrics import aggregate
from bench.record.prompts import Prompt, PromptSet
from bench.record.schema import check_writable, write_atomically
from bench.tables.summary import format_number
from runtime.entry import Parser, run_entry

if TYPE_CHECKING:
    from bench.measure.attempts import Setup
    from bench.measure.measure import Measurement

SCHEMA_VERSION, KIND = 1, "hybrid"
NOTES = Console(stderr=True, highlight=False, soft_wrap=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked options. Raises ValueError for unknown ones and for values that make no comparison."""
    parser = Parser(prog="bench/hybrid.py", description=__doc__.split("\n")[0], allow_abbrev=False)

    def add(flag: str, help: str, **settings) -> None:
        default = settings.get("default")
        parser.add_argument(flag, help=help if default is None else f"{help} (default: {default})", **settings)

    add("--checkpoint", "the head to decode with", metavar="DIR", required=True)
    add("--backbone", "Hugging Face directory of the backbone; without: the embedded tiny-vicuna", metavar="DIR")
    add("--dtype", "of the backbone's weights", choices=("float16", "float32"), default="float32")
    add("--template", "chat template by name; without: the tokenizer's own", metavar="NAME")
    add("--prompts", "prompt file; may be repeated; without: the embedded one", metavar="FILE", action="append")
    add("--num-prompts", "use this many prompts, spread over the categories; without: all", metavar="N", type=int)
    add("--max-new-tokens", "longest reply of a turn", metavar="N", type=int, default=128)
    add("--nodes", "tree budget, root included", metavar="N", type=int, default=DEFAULT_NODES)
    add("--out", "where the JSON goes", metavar="FILE")
    options = parser.parse_args(arguments)
    for name in ("num_prompts", "max_new_tokens", "nodes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    options.seed = 0  # of the sample that --num-prompts takes
    return options


@dataclass
class Turn:
    """One reply by one engine. baseline, head: token ids, without the head and with it; passes: those of the head."""

    prompt_ids: list[int]
    baseline: list[int]
    head: list[int]
    passes: int


@dataclass
class Side:
    """One engine. talks: the turns of each prompt, in the order of the prompts."""

    setup: Setup
    measured: Measurement
    talks: list[list[Turn]] = field(default_factory=list)


def decode(side: Side, prompt: Prompt, index: int, head_first: bool) -> None:
    """All turns of a prompt; later ones read this engine's own replies."""
    from bench.measure.attempts import BASELINE, HEAD, Conversation
    from bench.measure.measure import add_attempts

    talk, turns = Conversation(side.setup, prompt, index), []
    while (ids := talk.ask(len(turns))) is not None:
        ways = (HEAD, BASELINE) if head_first else (BASELINE, HEAD)
        given = {way: side.setup.decode(ids, way) for way in ways}
        talk.take(ids, given)
        head = given[HEAD]
        turns.append(Turn(ids, given[BASELINE].token_ids, head.token_ids, head.num_passes))
    side.talks.append(turns)
    add_attempts(side.setup, prompt, [talk.attempt], side.measured)


@dataclass(frozen=True)
class Agreement:
    """Prompts of which all turns are the same by both engines: without the head, with it, and in its passes too, which
    makes the accept length the same. difference: the first one, None without."""

    prompts: int
    autoregressive: int
    head: int
    passes: int
    difference: dict | None


def agree(prompt_ids: Sequence[str], ours: Sequence[list[Turn]], theirs: Sequence[list[Turn]]) -> Agreement:
    """Compare the talks of two engines, prompt by prompt. prompt_ids: their names.

    ``difference`` names prompt, turn, way (autoregressive or head), position and both tokens, None where a text ended.
    """
    from decoding.generate import first_difference

    counts, difference = {"autoregressive": 0, "head": 0, "passes": 0}, None
    for name, mine, other in zip(prompt_ids, ours, theirs, strict=True):
        for way, read in (("autoregressive", lambda t: t.baseline), ("head", lambda t: t.head)):
            texts = [[read(turn) for turn in talk] for talk in (mine, other)]
            counts[way] += texts[0] == texts[1]
            if texts[0] != texts[1] and difference is None:
                turn = next(i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
                pair = [text[turn] for text in texts]
                at = first_difference(*pair)
                tokens = [text[at] if at < len(text) else None for text in pair]
                difference = {"prompt_id": name, "turn": turn, "way": way, "position": at, "tokens": tokens}
        counts["passes"] += [turn.passes for turn in mine] == [turn.passes for turn in other]
    return Agreement(len(prompt_ids), *counts.values(), difference)


def run(options: argparse.Namespace, prompts: PromptSet) -> dict:
    """Both engines over all prompts; the record, JSON-ready. Raises ValueError for a head that torch cannot serve."""
    import runtime
    from backbone.config import read_config
    from backbone.tokenizer import EMBEDDED, load_tokenizer
    from bench.measure.measure import Measurement, warm_up
    from heads.checkpoint import find_checkpoint
    from heads.checkpoint import read_config as read_head_config
    from runtime.interrupt import check_interrupt, deferred_interrupts

    config = read_config(options.backbone or EMBEDDED)
    tokenizer = load_tokenizer(options.backbone, options.template)
    tokenizer.check_fits(config)
    directory = find_checkpoint(options.checkpoint)
    room, made = min(config.max_positions, DEFAULT_CACHE), {}
    for engine in (TORCH, JITTOR):
        tree = made[TORCH].setup.tree if made else None
        made[engine] = Side(make_setup(engine, options, tokenizer, room, directory, tree), Measurement())
    sides = {engine: made[engine] for engine in ENGINES}
    with deferred_interrupts():
        for side in sides.values():
            warm_up(side.setup)
        for index, prompt in enumerate(prompts.prompts):
            for engine in ENGINES if index % 2 == 0 else ENGINES[::-1]:
                decode(sides[engine], prompt, index, head_first=index // 2 % 2 == 1)
            if (index + 1) % 10 == 0:
                note(f"{index + 1} of {len(prompts.prompts)} prompts")
            check_interrupt()
    found = agree([prompt.prompt_id for prompt in prompts.prompts], *(sides[engine].talks for engine in ENGINES))
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
            "tree": tree.paths,
            "max_new_tokens": options.max_new_tokens,
        },
        "data": {"path": project_path(prompts.source), "sha256": prompts.sha256, "num_prompts": len(prompts.prompts)},
        "engines": {engine: figures(side) for engine, side in sides.items()},
        "agreement": {**dataclasses.asdict(found), "difference": explain(found.difference, prompts, sides)},
        "provenance": runtime.provenance(options.seed),
    }


def make_setup(engine: str, options: argparse.Namespace, tokenizer, cache_length: int, directory: Path, tree) -> Setup:
    """Backbone, head and cache of one engine. tree: None takes that of the checkpoint, or of its calibration."""
    from bench.measure.attempts import Setup
    from bench.measure.trees import check_room, choose_tree
    from heads.checkpoint import load_head

    backbone = load_engine(engine, options.backbone, options.dtype)
    head, config = load_head(directory, backbone)
    tree = tree or choose_tree(None, options.nodes, directory, config, head, "runs", note).tree
    check_room(tree.num_nodes, cache_length)
    cache = backbone.new_cache(cache_length)
    return Setup(backbone, tokenizer, cache, options.max_new_tokens, head=head, tree=tree)


def figures(side: Side) -> dict:
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
    for engine, side in sides.items():
        turn = side.talks[index][difference["turn"]]
        text = turn.baseline if difference["way"] == "autoregressive" else turn.head
        gaps[engine] = logit_gap(side.setup.backbone, turn.prompt_ids, text, difference["position"])
    return {**difference, "logit_gap": gaps}


def table_of(record: dict) -> Table:
    """One row per engine."""
    table = Table(title="Engines", title_justify="left")
    for name in ("engine", "weights"):
        table.add_column(name)
    for name in ("accept length [95%]", "tokens/s alone", "with the head", "speedup", "own parity"):
        table.add_column(name, justify="right")
    prompts = record["data"]["num_prompts"]
    for engine, found in record["engines"].items():
        table.add_row(
            engine,
            found["storage"],
            format_number(found["accept_length"], found["accept_length_ci"]),
            format_number(found["autoregressive_tokens_per_s"]),
            format_number(found["tokens_per_s"]),
            format_number(found["speedup"]),
            f"{found['parity']}/{prompts}",
        )
    return table


def note(text: str) -> None:
    """A line for the person at the terminal."""
    NOTES.print(text, markup=False)


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns 0, or 1 when a text differs between the engines."""
    options = parse(arguments)
    prepare_engine(TORCH)
    prompts = read_prompts(options)
    if options.out:
        check_writable(options.out)
    record = run(options, prompts)
    show_table(table_of(record))
    found = record["agreement"]
    note(
        f"the same by both engines, of {found['prompts']} prompts: {found['autoregressive']} texts without the head, "
        f"{found['head']} with it, {found['passes']} pass by pass"
    )
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    if options.out:
        write_atomically(options.out, text + "\n")
    print(text)
    return 0 if found["autoregressive"] == found["head"] == found["prompts"] else 1


if __name__ == "__main__":
    sys.exit(run_entry(main))
