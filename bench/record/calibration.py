"""The schema of a calibration (``bench/calibrate.py``): the trees of a head on a machine, where its file is, and
whether it fits a run.

The file is in the checkpoint's folder; that of a head without a checkpoint in the head's folder under the runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from decoding.tree import Tree
from runtime.records import Amount, Count, FileRecord, Interval, Model

FILE = "calibration.json"

Paths = list[list[Count]]


class Subject(Model):
    """What was calibrated. weights_sha256: of the head's weights; null for a head without a checkpoint. dtype: how the
    backbone's matrices are stored, possibly int8."""

    head: str
    head_config: dict[str, Any]
    weights_sha256: str | None
    backbone_fingerprint: str
    dtype: str


class Texts(Model):
    """What was decoded. texts: replies, one per turn; tokens: of their passes; sha256: of the prompt files."""

    path: str
    sha256: str
    prompts: Count
    texts: Count
    tokens: Count
    max_new_tokens: Count
    cache_length: Count
    template: str | None


class Acceptance(Model):
    """The texts' ``decoding.acceptance.count_ranks`` and the most frequent of their ``heads.ranks.count_paths``.

    positions: places to draft from. reached[d], accepted[d][r]: counts of them. paths: the most frequent first, each
    after its parent; path_counts: how often each occurs.
    """

    positions: Count
    reached: list[Count]
    accepted: list[list[Count]]
    paths: Paths
    path_counts: list[Count]


class Latency(Model):
    """The fields of ``decoding.search.LatencyCurve``, in seconds. draft_dtype: of what took ``chain_s``."""

    context: Count
    rows: list[Count]
    verify_s: list[Amount]
    begin_s: Amount
    widths: list[Count]
    draft_s: list[list[Amount]]
    rest_s: float
    root_rest_s: float
    chain_s: list[Amount] | None = None
    draft_dtype: str | None = None


class CandidateTree(Model):
    """A tree of the shortlist. accept_length: replayed over all texts; predicted_*: from the latency curve; measured_*:
    from the timed loop, with tokens as replayed."""

    tree: Paths
    num_nodes: Count
    depth: Count
    accept_length: Amount
    accept_length_ci: Interval | None
    predicted_s_per_pass: Amount
    measured_s_per_pass: Amount
    predicted_tokens_per_s: Amount
    measured_tokens_per_s: Amount


class Calibration(FileRecord):
    """A calibration file. chosen: index of the candidate that was fastest in the loop; of the lone root if none beat
    autoregressive decoding. loop: texts of the timed loop, and how many of them took, with every tree, as many passes
    as the replay predicts."""

    KIND: ClassVar[str] = "calibration"

    schema_version: Literal[1]
    kind: Literal["calibration"]
    provenance: dict[str, Any]
    subject: Subject
    texts: Texts
    acceptance: Acceptance
    latency: Latency
    loop: dict[str, Count]
    autoregressive_tokens_per_s: Amount
    candidates: list[CandidateTree]
    chosen: Count

    @model_validator(mode="after")
    def _trees_are_trees(self):
        if self.chosen >= len(self.candidates):
            raise ValueError(f"chosen is {self.chosen}, there are {len(self.candidates)} candidates")
        for paths in [self.acceptance.paths, *(candidate.tree for candidate in self.candidates)]:
            Tree.from_paths(paths)  # raises ValueError
        return self

    @property
    def best(self) -> CandidateTree:
        """The chosen candidate."""
        return self.candidates[self.chosen]

    @property
    def tree(self) -> Tree:
        """The chosen tree."""
        return Tree.from_paths(self.best.tree)

    def candidate(self, tree: Tree) -> CandidateTree | None:
        """The figures of this tree; None if it was not timed."""
        return next((each for each in self.candidates if Tree.from_paths(each.tree) == tree), None)


def calibration_path(directory: Path | None, name: str, runs: str | Path) -> Path:
    """Where the calibration of a head is. directory: of its checkpoint, None without one."""
    return (Path(directory) if directory else Path(runs) / name) / FILE


def of_other_head(calibration: Calibration, subject: Subject) -> str | None:
    """Why its counts are not those of this head, in a few words; None if they are."""
    ours = calibration.subject
    if ours.backbone_fingerprint != subject.backbone_fingerprint:
        return f"on backbone {ours.backbone_fingerprint}, this is {subject.backbone_fingerprint}"
    if (ours.head, ours.weights_sha256, ours.head_config) != (
        subject.head,
        subject.weights_sha256,
        subject.head_config,
    ):
        return "for other weights or options of the head"
    return None


def of_other_machine(calibration: Calibration, dtype: str, provenance: Mapping[str, Any]) -> str | None:
    """Why its seconds are not those of this machine, in a few words; None if they are."""
    if calibration.subject.dtype != dtype:
        return f"in {calibration.subject.dtype}, this run is in {dtype}"
    for key, what in (("device", "on device"), ("device_name", "on"), ("threads", "with threads:")):
        then, now = calibration.provenance.get(key), provenance.get(key)
        if then != now:
            return f"{what} {then}, this is {now}"
    return None
