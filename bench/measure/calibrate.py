"""Finds the tree that is fastest for a head on this machine, for ``bench/calibrate.py``.

The backbone decodes prompts, one teacher-forced pass of the head gives the ranks of all tokens, and from them the
accept length of any tree is replayed. The latency curve of this machine shortlists trees; the decoding loop, timed with
each of them and with a lone root, decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backbone.options import BackboneOptions
from bench.measure.heads import Found, find_head
from bench.measure.options import DEFAULT_PROMPTS, PromptOptions
from bench.measure.session import read_backbone
from bench.measure.tree_choice import subject_of
from bench.record.calibration import Calibration, CandidateTree, calibration_path
from bench.record.files import project_path
from bench.record.metrics import bootstrap
from bench.record.prompts import PromptSet
from bench.tables.terminal import note, progress_bar
from decoding.acceptance import RankedText, Replay, count_ranks, replay
from decoding.options import DecodingOptions
from decoding.search import Candidate, LatencyCurve, refine, search, shortlist
from decoding.tree import Tree
from heads.checkpoint import find_checkpoint, read_config
from heads.ranks import count_paths, fitted_paths
from runtime.atomic import check_writable
from runtime.options import option, option_fields


@dataclass
class CalibrateOptions(BackboneOptions, PromptOptions, DecodingOptions):
    """The options of bench/calibrate.py, which offers a few of the decoding options."""

    prompts: list[str] = option(
        [], "prompt file instead of held-out text; may be repeated", repeat=True, metavar="FILE"
    )
    max_new_tokens: int = option(128, "longest reply of a turn", metavar="N", least=2)
    head: str | None = option(
        None, "calibrate this head: its latest checkpoint, or none if it needs none", metavar="NAME"
    )
    checkpoint: str | None = option(None, "calibrate this checkpoint", metavar="DIR")
    runs: str = option("runs", "where train.py writes its runs", metavar="DIR")
    max_nodes: int = option(64, "largest tree to consider, root included", metavar="N", least=1)
    candidates: int = option(6, "trees to time in the loop, the lone root among them", metavar="N", least=1)
    timed: int = option(16, "replies to time each of them on", metavar="N", least=1)
    repeats: int = option(3, "times each of these is decoded; the median counts", metavar="N", least=1)
    out: str | None = option(
        None, "where the calibration goes; without: where bench/run.py looks for it", metavar="FILE"
    )

    def check(self) -> None:
        """Raises ValueError for options that exclude each other."""
        self.check_storage()
        if bool(self.head) == bool(self.checkpoint):
            raise ValueError("name what to calibrate: either --head NAME or --checkpoint DIR")

    def find_head(self) -> Found:
        """The checkpoint's directory and config. Raises ValueError if there is none."""
        if self.checkpoint:
            directory = find_checkpoint(self.checkpoint)
            return directory, read_config(directory)
        return find_head(self.head, self.runs)


OFFERED = option_fields(CalibrateOptions).keys() - option_fields(DecodingOptions).keys()
OFFERED |= {"max_new_tokens", "draft_dtype", "cache_length"}


def calibrate(options: CalibrateOptions) -> tuple[Calibration, Path]:
    """Everything from the options to the calibration, and where it belongs. Raises ValueError for what makes none."""
    config, tokenizer = read_backbone(options)
    cache_length = options.cache_rows(config.max_positions, options.max_nodes)
    directory, head_config = options.find_head()
    out = Path(options.out) if options.out else calibration_path(directory, head_config["head"], options.runs)
    check_writable(out)
    prompts = choose_prompts(options, tokenizer, config.max_positions, head_config)

    import runtime
    from bench.measure.attempts import Setup
    from heads.checkpoint import load_head
    from heads.registry import build
    from runtime.interrupt import deferred_interrupts

    backbone = options.load()
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
    own = {"schema_version": Calibration.VERSION, "kind": Calibration.KIND, "provenance": runtime.provenance()}
    return Calibration.parse({**own, "subject": subject, "texts": texts, **found}, "the calibration"), out


def choose_prompts(options: CalibrateOptions, tokenizer, max_positions: int, head_config: dict) -> PromptSet:
    """The prompts of the options, else held-out ones. Notes what is doubtful about them."""
    if options.prompts:
        if any(Path(file).resolve() == DEFAULT_PROMPTS for file in options.prompts):
            note("warning: bench/run.py measures on these prompts; a prediction for them is no test")
        return options.read_prompts()
    from bench.measure.texts import held_out_prompts

    prompts, sha256 = held_out_prompts(tokenizer, max_positions, options.num_prompts)
    trained_on = head_config.get("data", {}).get("sha256")
    if trained_on not in (None, sha256):
        note("warning: the head was trained on another text than the embedded corpus; see --prompts")
    return prompts


def measure(options: CalibrateOptions, setup, prompts: PromptSet) -> dict[str, Any]:
    """The measured part of a calibration, as plain data."""
    from bench.measure.latency import measure_curve, time_loops
    from bench.measure.texts import decode_texts, distinct, rank_texts

    with progress_bar() as progress:

        def stage(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(name, total=total, note="")
            return lambda count=1: progress.advance(task, count)

        texts = decode_texts(setup, prompts.prompts, stage("decode", len(prompts.prompts)))
        texts = [text for text in (texts if options.prompts else distinct(texts)) if len(text.token_ids) > 1]
        if not texts:
            raise ValueError("no reply is longer than one token: there is nothing to draft; use other prompts")
        ranked = rank_texts(setup.head, setup.backbone, texts, stage("rank", len(texts)))
        timed = sample(texts, options.timed)
        curve = measure_curve(setup, typical_context(texts), options.max_nodes, [texts[index] for index in timed[:4]])
        ordered = search(ranked, curve.seconds_per_pass, options.max_nodes, setup.cache.max_length)
        picked = improve(shortlist(ordered, options.candidates), ranked, curve, setup.cache.max_length)
        on_text = stage("time", len(timed))
        trees = [each.tree for each in picked]
        loops, baseline = time_loops(setup, trees, [texts[index] for index in timed], options.repeats, on_text)
    agreeing = _count_agreeing(trees, loops, [ranked[index] for index in timed], setup.cache.max_length)
    if agreeing < len(timed):
        note(f"warning: {agreeing} of {len(timed)} replies took as many passes as their ranks predict")
    prompt_ids = [text.prompt_id for text in texts]
    candidates = [
        CandidateTree(
            tree=each.tree.paths,
            num_nodes=each.tree.num_nodes,
            depth=each.tree.depth,
            accept_length=each.accept_length,
            accept_length_ci=interval(each.replay, prompt_ids),
            predicted_s_per_pass=each.seconds_per_pass,
            measured_s_per_pass=loop.seconds_per_pass,
            predicted_tokens_per_s=each.tokens_per_s,
            measured_tokens_per_s=each.accept_length / loop.seconds_per_pass,
        )
        for each, loop in zip(picked, loops, strict=True)
    ]
    speed = 1 / baseline.seconds_per_pass
    return {
        "texts": {"texts": len(texts), "tokens": picked[0].replay.tokens},
        "acceptance": _acceptance(ranked, options.max_nodes),
        "latency": {**dataclasses.asdict(curve), "draft_dtype": setup.draft_dtype if curve.chain_s else None},
        "loop": {"texts": len(timed), "repeats": options.repeats, "agreeing": agreeing},
        "autoregressive_tokens_per_s": speed,
        "candidates": candidates,
        "chosen": choose(candidates, speed),
    }


def interval(found: Replay, prompt_ids: Sequence[str]) -> tuple[float, float] | None:
    """The 95% interval of the accept length, resampling prompts with all their turns; None below two prompts.

    prompt_ids: of each text.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(prompt_ids))}
    sums = np.zeros((len(places), 2))
    for name, accepted in zip(prompt_ids, found.accepted_per_pass, strict=True):
        sums[places[name]] += sum(accepted), len(accepted)
    return bootstrap(sums, lambda sums: sums[:, 0] / sums[:, 1])


def sample(texts: Sequence, number: int) -> list[int]:
    """Indices of ``number`` texts that represent all, long ones in proportion to their tokens."""
    lengths = np.array([len(text.token_ids) - 1 for text in texts])
    places = (np.arange(number) + 0.5) / number * lengths.sum()
    return list(dict.fromkeys(np.searchsorted(lengths.cumsum(), places, side="right").tolist()))


def typical_context(texts: Sequence) -> list[int]:
    """The first half of the text whose prompt and half its reply are as long as the median."""
    lengths = [len(text.prompt_ids) + len(text.token_ids) // 2 for text in texts]
    index = int(np.argsort(lengths)[len(lengths) // 2])
    return [*texts[index].prompt_ids, *texts[index].token_ids][: lengths[index]]


def choose(candidates: Sequence[CandidateTree], autoregressive_tokens_per_s: float) -> int:
    """The candidate that was fastest in the loop; the lone root unless another one beats it and the baseline."""
    root = next(index for index, each in enumerate(candidates) if each.depth == 0)
    best = max(range(len(candidates)), key=lambda index: candidates[index].measured_tokens_per_s)
    limit = max(autoregressive_tokens_per_s, candidates[root].measured_tokens_per_s)
    return best if candidates[best].measured_tokens_per_s > limit else root


def improve(
    picked: Sequence[Candidate], ranked: Sequence[RankedText], curve: LatencyCurve, cache_length: int
) -> list[Candidate]:
    """The candidates, each with its tree refined if that is predicted to be faster: a chain drafts in less time than
    other trees of its size."""
    found = []
    for each in picked:
        tree = refine(ranked, each.tree, cache_length)
        other = Candidate(tree, replay(ranked, tree, None, cache_length), curve.seconds_per_pass(tree))
        found.append(max(each, other, key=lambda candidate: candidate.tokens_per_s))
    return found


def _count_agreeing(trees: Sequence[Tree], loops, ranked: Sequence[RankedText], cache_length: int) -> int:
    """Texts that took, with every tree, as many passes as the replay predicts."""
    predicted = [[len(each) for each in replay(ranked, tree, None, cache_length).accepted_per_pass] for tree in trees]
    return int(np.all([loop.passes for loop in loops] == np.array(predicted), axis=0).sum())


def _acceptance(ranked: Sequence[RankedText], max_nodes: int) -> dict[str, Any]:
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
