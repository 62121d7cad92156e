"""Heads served by vLLM beside ours, for ``bench/served.py``: the same head, prompts and chain, both in float32.

Each checkpoint is exported to every format that holds it and vLLM reads. Both sides decode the same prompts greedily;
what each pass added is compared draft by draft.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backbone.options import BackboneOptions
from bench.measure.options import PromptOptions
from bench.peers import vllm
from bench.record.files import project_path
from bench.tables.terminal import note
from decoding.options import DecodingOptions
from runtime.options import option

# Formats by the head that they hold, with vLLM's name of the method.
SERVED = {
    "mlp": {"medusa": "medusa", "vllm-medusa": "medusa"},
    "eagle": {"eagle": "eagle"},
    "eagle3": {"eagle3": "eagle3", "speculators": "eagle3"},
}


@dataclass
class ServedOptions(BackboneOptions, PromptOptions, DecodingOptions):
    """The options of bench/served.py. Both sides compute in float32, so that they can be held to each other."""

    SHOWN = ("python", "checkpoint", "depth", "backbone", "template", "prompts", "num_prompts", "max_new_tokens", "out")

    dtype: str = "float32"
    draft_dtype: str = "float32"
    python: str | None = option(None, "Python of the environment that has vLLM (required)", metavar="FILE")
    checkpoint: list[str] = option([], "a head to export and serve; may be repeated", repeat=True, metavar="DIR")
    depth: int = option(5, "tokens of a draft, at most the head's depths", metavar="N", least=1)
    out: str | None = option(None, "where the JSON goes", metavar="FILE")

    def check(self) -> None:
        """Raises ValueError without a Python and checkpoints."""
        missing = [name for name in ("python", "checkpoint") if not getattr(self, name)]
        if missing:
            raise ValueError(f"--{missing[0]} is missing; expected --python FILE --checkpoint DIR")
        if shutil.which(self.python) is None:
            raise ValueError(f"--python {self.python} is no program; expected that of an environment with vLLM")


def measure_served(options: ServedOptions, prompts) -> dict[str, Any]:
    """Every checkpoint in every format; the record, JSON-ready. Raises ValueError for a head that vLLM has no place
    for, before anything is measured."""
    import runtime
    from backbone.tokenizer import EMBEDDED
    from heads.checkpoint import find_checkpoint, read_config

    folders = [find_checkpoint(directory) for directory in options.checkpoint]
    heads = {folder: read_config(folder) for folder in folders}
    formats = {folder: formats_of(folder, config) for folder, config in heads.items()}
    backbone, tokenizer = options.load(), options.load_tokenizer()
    served = []
    for folder, config in heads.items():
        head = config["head"]
        ours = our_texts(options, backbone, tokenizer, folder, prompts)
        for format, method in formats[folder].items():
            theirs = their_texts(options, backbone, folder, format, method, ours)
            served.append({
                "format": format, "head": head, "checkpoint": project_path(folder), "method": method,
                "depth": options.depth, "ours": summary(ours), "vllm": summary(theirs["texts"]),
                "agreement": agreement(ours, theirs["texts"]),
            })  # fmt: skip
            versions = theirs["versions"]
            note(f"{head} as {format}: {len(ours)} texts")
    return {
        "schema_version": 1,
        "kind": "served",
        "backbone": {"path": project_path(options.backbone or EMBEDDED), "fingerprint": backbone.fingerprint},
        "dtype": options.dtype,
        "max_new_tokens": options.max_new_tokens,
        "data": {"path": project_path(prompts.source), "sha256": prompts.sha256, "num_prompts": len(prompts.prompts)},
        "served": served,
        "versions": versions,
        "provenance": runtime.provenance(0),
    }


def formats_of(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The formats that vLLM can serve a checkpoint in. Raises ValueError for a head that it has no place for."""
    head = config["head"]
    if head not in SERVED:
        raise ValueError(f"{folder}: vLLM has no place for a head {head}; expected one of {', '.join(SERVED)}")
    formats = dict(SERVED[head])
    if config["head_config"].get("lm_head") == "shared":  # Medusa's files then have none, and vLLM wants one
        del formats["medusa"]
    return formats


def our_texts(options: ServedOptions, backbone, tokenizer, folder: Path, prompts) -> list[dict[str, Any]]:
    """Every turn of every prompt, decoded with a chain; the texts as ``bench.peers.vllm.serve`` describes them, with
    the ids of their prompts."""
    from bench.measure.attempts import BASELINE, HEAD, Conversation, Setup
    from bench.measure.warmup import warm_up
    from decoding.tree import Tree
    from heads.checkpoint import load_head
    from runtime.interrupt import check_interrupt, deferred_interrupts

    head = load_head(folder, backbone)[0]
    if options.depth > head.num_depths:
        raise ValueError(f"{folder}: --depth {options.depth} exceeds the {head.num_depths} depths of the head")
    tree = Tree.chain(options.depth)
    cache = backbone.new_cache(options.cache_rows(backbone.config.max_positions, tree.num_nodes))
    setup = Setup(
        backbone, tokenizer, cache, options.max_new_tokens, head=head, tree=tree, draft_dtype=options.draft_dtype
    )
    texts = []
    with deferred_interrupts():
        warm_up(setup)
        for index, prompt in enumerate(prompts.prompts):
            talk, turn = Conversation(setup, prompt, index), 0
            while (ids := talk.ask(turn)) is not None:
                given = {side: setup.decode(ids, side) for side in (BASELINE, HEAD)}
                talk.take(ids, given)
                found, turn = given[HEAD], turn + 1
                texts.append({
                    "prompt_ids": [int(token) for token in ids],
                    "tokens": [int(token) for token in found.token_ids],
                    "passes": [int(count) for count in found.accepted_per_pass],
                    "drafts": int(found.reached_by_depth[0]) if found.reached_by_depth else 0,
                    "accepted": [int(count) for count in found.accepted_by_depth],
                    "seconds": found.timers.total_s - found.timers.prefill_s,
                })  # fmt: skip
            check_interrupt()
    return texts


def their_texts(options: ServedOptions, backbone, folder: Path, format: str, method: str, ours) -> dict[str, Any]:
    """vLLM's answer on the prompts of our texts, with the head exported to a folder that is removed afterwards."""
    from backbone.formats import ConvertOptions
    from heads.formats import convert
    from heads.formats.contents import Target

    with tempfile.TemporaryDirectory() as place:
        with contextlib.redirect_stdout(sys.stderr):
            exported = ConvertOptions(verify=True, backbone=options.backbone, merge=True)
            if convert(folder, format, Path(place) / "head", exported) != 0:
                raise ValueError(f"{folder} differs from what was written as {format}; the differences are above")
        return vllm.ask(options.python, {
            "backbone": str(Target(options.backbone).directory.resolve()),
            "draft": {
                "method": method, "model": str(Path(place) / "head"), "num_speculative_tokens": options.depth
            },
            "prompts": [text["prompt_ids"] for text in ours],
            "max_new_tokens": options.max_new_tokens,
            "stop_ids": sorted(int(token) for token in options.load_tokenizer().eos_ids),
            "max_length": backbone.config.max_positions,
        })  # fmt: skip


def summary(texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over texts. accepted: drafts accepted at each position; tokens_per_s: without prefills and their tokens."""
    tokens, seconds = (sum(count) for count in zip(*((len(t["tokens"]) - 1, t["seconds"]) for t in texts), strict=True))
    passes = sum(len(text["passes"]) for text in texts)
    longest = max(len(text["accepted"]) for text in texts)
    accepted = [[*text["accepted"], *[0] * (longest - len(text["accepted"]))] for text in texts]
    return {
        "tokens": tokens,
        "passes": passes,
        "drafts": int(sum(text["drafts"] for text in texts)),
        "accepted": np.sum(accepted, 0, dtype=int).tolist(),
        "accept_length": tokens / passes,
        "tokens_per_s": tokens / seconds,
    }


def agreement(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many texts are the same, and the passes of those that are the same, one by one.

    Worked example: passes [3, 1, 2] and [3, 2, 1] of one text that is the same are 3 passes, 1 of them alike.
    """
    same = [pair for pair in zip(ours, theirs, strict=True) if pair[0]["tokens"] == pair[1]["tokens"]]
    pairs = [(a["passes"], b["passes"]) for a, b in same]
    return {
        "texts": len(ours),
        "same_texts": len(same),
        "passes": sum(max(len(a), len(b)) for a, b in pairs),
        "same_passes": sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False)),
    }
