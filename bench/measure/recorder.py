"""From measurements to records: what all records of a run have in common, and what is a head's own."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measure.options import DEFAULT_PROMPTS, project_path
from bench.measure.trees import Choice, shape_fields
from bench.record.prompts import PromptSet
from bench.record.schema import KIND, SCHEMA_VERSION, Quantization, Record, parse_record
from bench.tables.summary import AUTOREGRESSIVE
from decoding.tree import DynamicTree, Tree

if TYPE_CHECKING:
    from bench.measure.attempts import Setup
    from bench.measure.measure import Measurement


@dataclass
class Trained:
    """A head that is ready to be measured. directory: its checkpoint, None for one that needs none and has none; out:
    where its result goes."""

    name: str
    directory: Path | None
    config: dict
    head: object
    choice: Choice
    out: Path

    @property
    def tree(self) -> Tree:
        """What it drafts with."""
        return self.choice.tree


def read_stats(config: dict, name: str) -> dict:
    """What the head said of itself on its held-out text. Raises ValueError where that is no table of figures."""
    stats = config.get("metrics", {}).get("stats", {})
    if not isinstance(stats, dict):
        raise ValueError(f"the checkpoint of {name} holds no usable stats: expected an object, got {stats!r}")
    return stats


def source(options: argparse.Namespace) -> str:
    """The prompt files by name."""
    return " + ".join(project_path(file) for file in options.prompts or [DEFAULT_PROMPTS])


class Recorder:
    """Turns measurements into records: holds what all records of a run have in common."""

    def __init__(
        self, options: argparse.Namespace, setup: Setup, prompts: PromptSet, quantization: Quantization | None = None
    ):
        import runtime
        from backbone.tokenizer import EMBEDDED

        c, backbone = setup.backbone.config, setup.backbone
        self.setup, self.prompts, self.provenance = setup, prompts, runtime.provenance(options.seed)
        self.quantization = quantization
        self.backbone = {
            "path": project_path(options.backbone or EMBEDDED),
            "fingerprint": backbone.fingerprint,
            "dtype": backbone.dtype,
            "hidden_size": c.hidden_size,
            "num_layers": c.num_layers,
            "vocab_size": c.vocab_size,
            "engine": options.backbone_engine,
            "storage": backbone.storage,
        }
        self.decoding = {
            **setup.acceptance.fields(),
            "max_new_tokens": options.max_new_tokens,
            "cache_length": setup.cache.max_length,
            "template": options.template,
            "batch_size": options.batch_size,
        }
        self.source = source(options)

    def _record(self, name: str, measured: Measurement, rows, timers, tree: Tree | DynamicTree, **own) -> Record:
        """own: top-level keys that only a head's record fills."""
        from bench.measure.measure import timing
        from bench.record.metrics import aggregate

        metrics, categories = aggregate(rows)
        shape = {**shape_fields(tree), "draft_dtype": own.pop("draft_dtype", None)}
        config = {"backbone": self.backbone, "decoding": {**self.decoding, **shape}, "repeats": self.setup.repeats}
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "status": "interrupted" if measured.interrupted else "complete",
            "head": name,
            "config": {**config, "head": own.pop("head_config", {})},
            "provenance": self.provenance,
            "checkpoint": None,
            "data": {
                "path": self.source,
                "sha256": self.prompts.sha256,
                "num_prompts": len(self.prompts.prompts),
                "dropped": {**self.prompts.dropped, "turns_past_the_cache": measured.dropped_turns},
            },
            "baseline": None,
            "metrics": metrics,
            "timing": timing(timers),
            "parity": None,
            "failures": measured.failures,
            "categories": categories,
            "per_prompt": rows,
            "quantization": self.quantization,
        }
        return parse_record({**record, **own}, f"the result of {name}")

    def baseline(self, measured: Measurement) -> Record:
        """The record of autoregressive decoding itself."""
        rows, timers = measured.baseline_rows, measured.baseline_timers
        return self._record(AUTOREGRESSIVE, measured, rows, timers, Tree.autoregressive())

    def head(self, trained: Trained, measured: Measurement) -> Record:
        """The record of a head, with what the baseline did on the same prompts."""
        stats = read_stats(trained.config, trained.name)
        decoded = dataclasses.replace(self.setup, head=trained.head, tree=trained.tree)
        return self._record(
            trained.name,
            measured,
            measured.rows,
            measured.timers,
            trained.tree,
            head_config=trained.config["head_config"],
            checkpoint=describe_checkpoint(trained) if trained.directory else None,
            baseline=measured.baseline,
            parity=measured.parity,
            head_stats=stats,
            draft_dtype=decoded.draft_dtype if decoded.drafts_in_one_call else None,
            adaptation=measured.adaptation(stats),
            prediction=trained.choice.prediction if self.setup.acceptance.exact else None,
        )


def describe_checkpoint(trained: Trained) -> dict:
    """The ``checkpoint`` of a record."""
    from heads.checkpoint import weights_sha256

    progress, scored = trained.config.get("run", {}), trained.config.get("metrics", {})
    return {
        "path": project_path(trained.directory),
        "sha256": weights_sha256(trained.directory),
        "parameters": trained.head.num_parameters,
        "train_steps": progress.get("steps"),
        "train_tokens": progress.get("tokens"),
        "train_s": progress.get("train_s"),
        "seed": trained.config.get("trainer", {}).get("seed"),
        "expected_accept_length": scored.get("expected_accept_length"),
        "tree_nodes": scored.get("tree_nodes"),
    }
