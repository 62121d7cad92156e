"""Find the tree that is fastest for a head on this machine, and keep it for ``bench/run.py --tree auto``.

    python bench/calibrate.py --head gated_rnn

The backbone decodes prompts, one forced pass of the head gives the ranks of all tokens, and from them the accept
length of any tree is replayed. The latency curve of this machine shortlists trees; the loop itself, timed with each of
them and without any, decides. Without --prompts the prompts are what users say in the held-out conversations of the
embedded corpus. Progress is shown on stderr; stdout gets a table and the calibration on one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: imports start at the repository root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from backbone.engines import prepare_engine
from bench.compare import show_table
from bench.measure.calibration import (
    KIND,
    SCHEMA_VERSION,
    Calibration,
    CandidateTree,
    calibration_path,
    parse_calibration,
    write_calibration,
)
from bench.measure.options import (
    DEFAULT_CACHE,
    DEFAULT_PROMPTS,
    DRAFT_DTYPES,
    add_backbone_options,
    project_path,
    read_prompts,
)
from bench.measure.trees import check_room, describe_tree, subject_of
from bench.record.prompts import PromptSet
from bench.record.schema import check_writable
from decoding.acceptance import RankedText, Replay, count_ranks, replay
from decoding.search import Candidate, refine, search, shortlist
from decoding.tree import Tree
from heads.ranks import count_paths, fitted_paths
from runtime.entry import Parser, run_entry

NOTES = Console(stderr=True, highlight=False, soft_wrap=True)
NUM_RESAMPLES = 2000


def build_parser() -> Parser:
    """The options of this entry."""
    parser = Parser(prog="bench/calibrate.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)

    def add(flag: str, help: str, **settings) -> None:
        default = settings.get("default")
        parser.add_argument(flag, help=help if default is None else f"{help} (default: {default})", **settings)

    add("--head", "calibrate this head: its latest checkpoint, or none if it needs none", metavar="NAME")
    add("--checkpoint", "calibrate this checkpoint", metavar="DIR")
    add_backbone_options(add)
    add("--prompts", "prompt file instead of held-out text; may be repeated", metavar="FILE", action="append")
    add("--num-prompts", "use this many prompts, spread over the categories; without: all", metavar="N", type=int)
    add("--max-new-tokens", "longest reply of a turn", metavar="N", type=int, default=128)
    add("--max-nodes", "largest tree to consider, root included", metavar="N", type=int, default=64)
    add("--cache-length", "rows of the key-value cache, as bench/run.py takes it", metavar="N", type=int)
    add("--candidates", "trees to time in the loop, that of one node among them", metavar="N", type=int, default=6)
    chains = "of the copy of the head's matrices that drafts a chain in one call"
    add("--draft-dtype", chains, choices=DRAFT_DTYPES, default=DRAFT_DTYPES[0])
    add("--timed", "replies to time each of them on", metavar="N", type=int, default=16)
    add("--repeats", "times each of these is decoded; the median counts", metavar="N", type=int, default=3)
    add("--out", "where the calibration goes; without: where bench/run.py looks for it", metavar="FILE")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked options. Raises ValueError for unknown ones, and for values that make no calibration."""
    options = build_parser().parse_args(arguments)
    least = {"max_nodes": 1, "max_new_tokens": 2, "num_prompts": 1, "cache_length": 2, "candidates": 1, "timed": 1}
    for name, smallest in {**least, "repeats": 1}.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}")
    if bool(options.head) == bool(options.checkpoint):
        raise ValueError("name what to calibrate: either --head NAME or --checkpoint DIR")
    options.seed = 0  # of the sample that --num-prompts takes
    return options


def note(text: str) -> None:
    """A line for the person at the terminal."""
    NOTES.print(text, markup=False)


def find_head(options: argparse.Namespace) -> tuple[Path | None, dict]:
    """The checkpoint's directory and config; None and the default options of a head that needs none and has none."""
    from bench.run import fresh_config
    from heads.checkpoint import find_checkpoint, latest_checkpoints, read_config
    from heads.registry import head_class

    directory = find_checkpoint(options.checkpoint) if options.checkpoint else None
    if directory is None:
        trained = head_class(options.head).trained
        directory = latest_checkpoints(Path(options.runs)).get(options.head)
        if directory is None and trained:
            raise ValueError(
                f"head {options.head!r} is not trained: nothing in {options.runs}; "
                f"run python train.py --head {options.head}"
            )
    return directory, read_config(directory) if directory else fresh_config(options.head)


def find_prompts(options: argparse.Namespace, tokenizer, max_positions: int, config: dict) -> PromptSet:
    """The prompts that were asked for, else the held-out ones. Says what is doubtful about them."""
    if options.prompts:
        prompts = read_prompts(options)
        if any(Path(file).resolve() == DEFAULT_PROMPTS for file in options.prompts):
            note("warning: these are the prompts that bench/run.py measures on; a prediction for them is no test")
        return prompts
    from bench.measure.texts import held_out_prompts

    prompts, sha256 = held_out_prompts(tokenizer, max_positions, options.num_prompts)
    trained_on = config.get("data", {}).get("sha256")
    if trained_on not in (None, sha256):
        note("warning: the head was trained on another text than the embedded corpus; see --prompts")
    return prompts


def interval(found: Replay, prompt_ids: Sequence[str]) -> tuple[float, float] | None:
    """The 95% interval of the accept length, drawing prompts with all their turns; None below two prompts.

    prompt_ids: of each text.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(prompt_ids))}
    if len(places) < 2:
        return None
    sums = np.zeros((len(places), 2))
    for name, accepted in zip(prompt_ids, found.accepted_per_pass, strict=True):
        sums[places[name]] += sum(accepted), len(accepted)
    draws = np.random.default_rng(0).multinomial(len(places), np.full(len(places), 1 / len(places)), NUM_RESAMPLES)
    tokens, passes = (draws @ sums).T
    lengths = tokens[passes > 0] / passes[passes > 0]
    return tuple(np.quantile(lengths, [0.025, 0.975]).tolist()) if len(lengths) else None


def sample(texts: Sequence, number: int) -> list[int]:
    """Indices of ``number`` texts that stand for all, long ones in proportion to their tokens."""
    lengths = np.array([len(text.token_ids) - 1 for text in texts])
    places = (np.arange(number) + 0.5) / number * lengths.sum()
    return list(dict.fromkeys(np.searchsorted(lengths.cumsum(), places, side="right").tolist()))


def choose(candidates: Sequence[CandidateTree], autoregressive_tokens_per_s: float) -> int:
    """The candidate that was fastest in the loop; the one that drafts nothing unless another beats it and the twin."""
    root = next(index for index, each in enumerate(candidates) if each.depth == 0)
    best = max(range(len(candidates)), key=lambda index: candidates[index].measured_tokens_per_s)
    limit = max(autoregressive_tokens_per_s, candidates[root].measured_tokens_per_s)
    return best if candidates[best].measured_tokens_per_s > limit else root


def calibrate(options: argparse.Namespace) -> tuple[Calibration, Path]:
    """Everything from the options to the calibration, and where it belongs. Raises ValueError for what makes none."""
    from backbone.config import read_config
    from backbone.tokenizer import EMBEDDED, load_tokenizer

    config = read_config(options.backbone or EMBEDDED)
    tokenizer = load_tokenizer(options.backbone, options.template)
    tokenizer.check_fits(config)
    cache_length = options.cache_length or min(config.max_positions, DEFAULT_CACHE)
    if cache_length > config.max_positions:
        raise ValueError(f"--cache-length {cache_length} exceeds the {config.max_positions} positions of the backbone")
    check_room(options.max_nodes, cache_length)
    directory, head_config = find_head(options)
    out = Path(options.out) if options.out else calibration_path(directory, head_config["head"], options.runs)
    check_writable(out)
    prompts = find_prompts(options, tokenizer, config.max_positions, head_config)

    import runtime
    from backbone.engines import load_engine
    from bench.measure.attempts import Setup
    from heads.checkpoint import load_head
    from heads.registry import build
    from runtime.interrupt import deferred_interrupts

    kept = options.load_in_8bit, options.load_in_4bit
    backbone = load_engine(options.backbone_engine, options.backbone, options.dtype, *kept)
    if directory:
        head = load_head(directory, backbone)[0]
    else:
        head = build(head_config["head"], head_config["head_config"], backbone)
    cache = backbone.new_cache(cache_length)
    setup = Setup(backbone, tokenizer, cache, options.max_new_tokens, head=head, draft_dtype=options.draft_dtype)
    subject = subject_of(directory, head_config, backbone)
    note(f"device    {runtime.device} ({runtime.device_reason})")
    note(f"backbone  {options.backbone or 'embedded tiny-vicuna'} {backbone.fingerprint}, {backbone.storage}")
    note(f"head      {subject.head} ({head.num_parameters / 1e6:.2f} M, {head.num_depths} depths)")
    note(f"data      {project_path(prompts.source)}, {len(prompts.prompts)} prompts")
    note(f"decoding  greedy, at most {options.max_nodes} nodes, {options.max_new_tokens} new tokens a turn")
    with deferred_interrupts():
        found = measure(options, setup, prompts)
    texts = {
        "path": project_path(prompts.source),
        "sha256": prompts.sha256,
        "prompts": len(prompts.prompts),
        "max_new_tokens": options.max_new_tokens,
        "cache_length": cache_length,
        "template": options.template,
        **found.pop("texts"),
    }
    head_of_file = {"schema_version": SCHEMA_VERSION, "kind": KIND, "provenance": runtime.provenance()}
    record = {**head_of_file, "subject": subject.model_dump(mode="json"), "texts": texts, **found}
    return parse_calibration(record, "the calibration"), out


def measure(options: argparse.Namespace, setup, prompts: PromptSet) -> dict:
    """The measured part of a calibration, as plain data."""
    from bench.measure.latency import measure_curve, time_loops
    from bench.measure.texts import decode_texts, distinct, rank_texts

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=NOTES, disable=not sys.stderr.isatty()) as progress:

        def stage(name: str, total: int):
            task = progress.add_task(name, total=total)
            return lambda count=1: progress.advance(task, count)

        texts = decode_texts(setup, prompts.prompts, stage("decode", len(prompts.prompts)))
        texts = [text for text in (texts if options.prompts else distinct(texts)) if len(text.token_ids) > 1]
        if not texts:
            raise ValueError("no reply is longer than one token: there is nothing to draft; use other prompts")
        ranked = rank_texts(setup.head, setup.backbone, texts, stage("rank", len(texts)))
        timed = sample(texts, options.timed)
        context = _typical(texts)
        curve = measure_curve(setup, context, options.max_nodes, [texts[index] for index in timed[:4]])
        ordered = search(ranked, curve.seconds_per_pass, options.max_nodes, setup.cache.max_length)
        picked = improve(shortlist(ordered, options.candidates), ranked, curve, setup.cache.max_length)
        on_text = stage("time", len(timed))
        trees = [each.tree for each in picked]
        loops, twin = time_loops(setup, trees, [texts[index] for index in timed], options.repeats, on_text)
    agreeing = _count_agreeing(trees, loops, [ranked[index] for index in timed], setup.cache.max_length)
    if agreeing < len(timed):
        note(f"warning: of {len(timed)} replies {agreeing} took as many passes as their ranks say")
    prompt_ids = [text.prompt_id for text in texts]
    candidates = [
        {
            "tree": each.tree.paths,
            "num_nodes": each.tree.num_nodes,
            "depth": each.tree.depth,
            "accept_length": each.accept_length,
            "accept_length_ci": interval(each.replay, prompt_ids),
            "predicted_s_per_pass": each.seconds_per_pass,
            "measured_s_per_pass": loop.seconds_per_pass,
            "predicted_tokens_per_s": each.tokens_per_s,
            "measured_tokens_per_s": each.accept_length / loop.seconds_per_pass,
        }
        for each, loop in zip(picked, loops, strict=True)
    ]
    speed = 1 / twin.seconds_per_pass
    return {
        "texts": {"texts": len(texts), "tokens": picked[0].replay.tokens},
        "acceptance": _acceptance(ranked, options.max_nodes),
        "latency": {**dataclasses.asdict(curve), "draft_dtype": setup.draft_dtype if curve.chain_s else None},
        "loop": {"texts": len(timed), "repeats": options.repeats, "agreeing": agreeing},
        "autoregressive_tokens_per_s": speed,
        "candidates": candidates,
        "chosen": choose([CandidateTree.model_validate(each) for each in candidates], speed),
    }


def improve(picked: Sequence[Candidate], ranked: Sequence[RankedText], curve, cache_length: int) -> list[Candidate]:
    """The candidates with their trees refined, where that is expected to be faster: a chain drafts in less time than
    other trees of its size."""
    found = []
    for each in picked:
        tree = refine(ranked, each.tree, cache_length)
        other = Candidate(tree, replay(ranked, tree, None, cache_length), curve.seconds_per_pass(tree))
        found.append(max(each, other, key=lambda candidate: candidate.tokens_per_s))
    return found


def _typical(texts: Sequence) -> list[int]:
    """The first half of the text whose prompt and half its reply are as long as the median."""
    lengths = [len(text.prompt_ids) + len(text.token_ids) // 2 for text in texts]
    index = int(np.argsort(lengths)[len(lengths) // 2])
    return [*texts[index].prompt_ids, *texts[index].token_ids][: lengths[index]]


def _count_agreeing(trees: Sequence[Tree], loops, ranked: Sequence[RankedText], cache_length: int) -> int:
    """Texts whose passes the replay foretold for every tree."""
    foretold = [[len(each) for each in replay(ranked, tree, None, cache_length).accepted_per_pass] for tree in trees]
    return sum(
        all(loop.passes[text] == passes[text] for loop, passes in zip(loops, foretold, strict=True))
        for text in range(len(ranked))
    )


def _acceptance(ranked: Sequence[RankedText], max_nodes: int) -> dict:
    """The ``acceptance`` of a calibration."""
    ranks = np.concatenate([text.ranks for text in ranked], 1)
    (reached, accepted), counts = count_ranks(ranks), count_paths(ranks)
    paths = fitted_paths(counts, max_nodes)
    return {
        "positions": int((ranks[0] >= 0).sum()),
        "reached": reached.tolist(),
        "accepted": accepted.tolist(),
        "paths": [list(path) for path in paths],
        "path_counts": [counts[path] for path in paths],
    }


def table_of(calibration: Calibration) -> Table:
    """One row per candidate; the chosen one is marked."""
    title = f"{calibration.subject.head} on this machine, by its latency curve / by its loop"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("tree")
    for name in ("accept length [95%]", "ms/pass", "tokens/s", "speedup"):
        table.add_column(name, justify="right")
    alone = calibration.autoregressive_tokens_per_s
    for index, each in enumerate(calibration.candidates):
        low, high = each.accept_length_ci or (each.accept_length, each.accept_length)
        table.add_row(
            describe_tree(Tree.from_paths(each.tree)) + (" (chosen)" if index == calibration.chosen else ""),
            f"{each.accept_length:.2f} [{low:.2f}, {high:.2f}]",
            f"{1e3 * each.predicted_s_per_pass:.3g} / {1e3 * each.measured_s_per_pass:.3g}",
            f"{each.predicted_tokens_per_s:.0f} / {each.measured_tokens_per_s:.0f}",
            f"{each.measured_tokens_per_s / alone:.2f}",
            style="bold" if index == calibration.chosen else "",
        )
    table.add_row("autoregressive", "1.00", f"{1e3 / alone:.3g}", f"{alone:.0f}", "1.00")
    return table


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    options = parse(arguments)
    prepare_engine(options.backbone_engine)
    calibration, out = calibrate(options)
    write_calibration(calibration, out)
    show_table(table_of(calibration))
    note(f"written to {out}")
    if calibration.best.depth == 0:
        note("no tree was faster than decoding token by token here; bench/run.py --tree auto will not draft")
    print(json.dumps(calibration.model_dump(mode="json"), ensure_ascii=False, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
