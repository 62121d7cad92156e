"""From measurements to records: what all records of a run have in common, and what is specific to a head."""

from __future__ import annotations

import dataclasses

import runtime
from backbone.tokenizer import EMBEDDED
from bench.measure.attempts import Setup
from bench.measure.heads import LoadedHead
from bench.measure.options import RunOptions
from bench.measure.side_by_side import Measurement
from bench.measure.tree_choice import shape_fields
from bench.record.files import project_path
from bench.record.metrics import aggregate
from bench.record.prompts import PromptSet
from bench.record.schema import AUTOREGRESSIVE, Quantization, Record
from decoding.tree import DynamicTree, Tree
from heads.checkpoint import weights_sha256


class Recorder:
    """Turns measurements into records. It holds what all records of a run have in common."""

    def __init__(self, options: RunOptions, setup: Setup, prompts: PromptSet, quantization: Quantization | None = None):
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
        self.source = options.prompt_source

    def _record(self, name: str, measured: Measurement, rows, timers, tree: Tree | DynamicTree, **own) -> Record:
        """own: top-level keys that only a head's record fills."""
        metrics, categories = aggregate(rows)
        shape = {**shape_fields(tree), "draft_dtype": own.pop("draft_dtype", None)}
        config = {"backbone": self.backbone, "decoding": {**self.decoding, **shape}, "repeats": self.setup.repeats}
        record = {
            "schema_version": Record.VERSION,
            "kind": Record.KIND,
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
            "timing": dataclasses.asdict(timers),
            "parity": None,
            "failures": measured.failures,
            "categories": categories,
            "per_prompt": rows,
            "quantization": self.quantization,
        }
        return Record.parse({**record, **own}, f"the result of {name}")

    def baseline(self, measured: Measurement) -> Record:
        """The record of autoregressive decoding itself."""
        rows, timers = measured.baseline_rows, measured.baseline_timers
        return self._record(AUTOREGRESSIVE, measured, rows, timers, Tree.autoregressive())

    def head(self, loaded: LoadedHead, measured: Measurement) -> Record:
        """The record of a head, with what the baseline did on the same prompts."""
        decoded = dataclasses.replace(self.setup, head=loaded.head, tree=loaded.tree)
        return self._record(
            loaded.name,
            measured,
            measured.rows,
            measured.timers,
            loaded.tree,
            head_config=loaded.config["head_config"],
            checkpoint=describe_checkpoint(loaded) if loaded.directory else None,
            baseline=measured.baseline,
            parity=measured.parity,
            head_stats=loaded.stats,
            draft_dtype=decoded.draft_dtype if decoded.drafts_in_one_call else None,
            adaptation=measured.adaptation(loaded.stats),
            prediction=loaded.choice.prediction if self.setup.acceptance.exact else None,
        )


def describe_checkpoint(loaded: LoadedHead) -> dict:
    """The ``checkpoint`` of a record."""
    progress, scored = loaded.config.get("run", {}), loaded.config.get("metrics", {})
    return {
        "path": project_path(loaded.directory),
        "sha256": weights_sha256(loaded.directory),
        "parameters": loaded.head.num_parameters,
        "train_steps": progress.get("steps"),
        "train_tokens": progress.get("tokens"),
        "train_s": progress.get("train_s"),
        "seed": loaded.config.get("trainer", {}).get("seed"),
        "expected_accept_length": scored.get("expected_accept_length"),
        "tree_nodes": scored.get("tree_nodes"),
    }
