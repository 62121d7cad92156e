"""What ``bench/calibrate.py`` keeps of a head on a machine, as a file: the schema, where it lies, and what it is for.

Units stand in the keys. The file lies in the checkpoint's folder; that of a head without a checkpoint in the head's
folder under the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.record.schema import Count, Interval, Seconds, explain, write_atomically
from decoding.tree import Tree

SCHEMA_VERSION, KIND, FILE = 1, "calibration", "calibration.json"

Length = Annotated[float, Field(ge=0)]
Paths = list[list[Count]]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Subject(_Model):
    """What was calibrated. weights_sha256: of the head's weights; null for a head without a checkpoint. dtype: how the
    backbone's matrices are kept, int8 among them."""

    head: str
    head_config: dict[str, Any]
    weights_sha256: str | None
    backbone_fingerprint: str
    dtype: str


class Texts(_Model):
    """What was decoded for it. texts: replies, one a turn; tokens: of their passes; sha256: of the prompt files."""

    path: str
    sha256: str
    prompts: Count
    texts: Count
    tokens: Count
    max_new_tokens: Count
    cache_length: Count
    template: str | None


class Acceptance(_Model):
    """What ``decoding.acceptance.count_ranks`` and the most frequent of ``heads.ranks.count_paths`` say of the texts.

    positions: places to draft from. reached[d], accepted[d][r]: of them. paths: the most frequent first, each behind
    its parent; path_counts: how often.
    """

    positions: Count
    reached: list[Count]
    accepted: list[list[Count]]
    paths: Paths
    path_counts: list[Count]


class Latency(_Model):
    """The fields of ``decoding.search.LatencyCurve``, in seconds. draft_dtype: of what took ``chain_s``."""

    context: Count
    rows: list[Count]
    verify_s: list[Seconds]
    begin_s: Seconds
    widths: list[Count]
    draft_s: list[list[Seconds]]
    rest_s: float
    root_rest_s: float
    chain_s: list[Seconds] | None = None
    draft_dtype: str | None = None


class CandidateTree(_Model):
    """A tree of the shortlist. accept_length: replayed over all texts; predicted_*: by the latency curve; measured_*:
    of the timed loop, tokens as replayed."""

    tree: Paths
    num_nodes: Count
    depth: Count
    accept_length: Length
    accept_length_ci: Interval | None
    predicted_s_per_pass: Seconds
    measured_s_per_pass: Seconds
    predicted_tokens_per_s: Seconds
    measured_tokens_per_s: Seconds


class Calibration(_Model):
    """A calibration file. chosen: index of the candidate that was fastest in the loop; the one without a node below
    the root where none was faster than autoregressive decoding. loop: prompts of the timed loop, and of those the
    ones whose passes were as many as the replay says, with every tree."""

    schema_version: Literal[1]
    kind: Literal["calibration"]
    provenance: dict[str, Any]
    subject: Subject
    texts: Texts
    acceptance: Acceptance
    latency: Latency
    loop: dict[str, Count]
    autoregressive_tokens_per_s: Seconds
    candidates: list[CandidateTree]
    chosen: Count

    @property
    def best(self) -> CandidateTree:
        """The chosen candidate."""
        return self.candidates[self.chosen]

    @property
    def tree(self) -> Tree:
        """The chosen tree."""
        return Tree.from_paths(self.best.tree)

    def candidate(self, tree: Tree) -> CandidateTree | None:
        """The figures of this very tree, where it was timed."""
        return next((each for each in self.candidates if Tree.from_paths(each.tree) == tree), None)


def calibration_path(directory: Path | None, name: str, runs: str | Path) -> Path:
    """Where the calibration of a head lies. directory: of its checkpoint; None: it has none."""
    return (Path(directory) if directory else Path(runs) / name) / FILE


def write_calibration(calibration: Calibration, path: str | Path) -> None:
    """Write it, whole or not at all. Raises OSError when the file cannot be written."""
    text = json.dumps(calibration.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def read_calibration(path: str | Path) -> Calibration:
    """Read one. Raises ValueError naming the file and what is wrong with it, OSError when it cannot be read."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON and text that is not UTF-8
        raise ValueError(f"{path}: {error}") from error
    return parse_calibration(data, path)


def parse_calibration(data: object, where: str | Path) -> Calibration:
    """A checked calibration from plain data. Raises ValueError naming ``where`` and what does not fit."""
    if not isinstance(data, Mapping) or data.get("kind") != KIND or data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{where}: not a calibration of schema version {SCHEMA_VERSION}; run bench/calibrate.py again")
    try:
        found = Calibration.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from error
    if found.chosen >= len(found.candidates):
        raise ValueError(f"{where}: chosen is {found.chosen}, there are {len(found.candidates)} candidates")
    for each in [found.acceptance.paths, *(candidate.tree for candidate in found.candidates)]:
        try:
            Tree.from_paths(each)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return found


def of_other_head(calibration: Calibration, subject: Subject) -> str | None:
    """Why its counts are not this head's, as a few words; None when they are."""
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
    """Why its seconds are not those of here, as a few words; None when they are."""
    if calibration.subject.dtype != dtype:
        return f"in {calibration.subject.dtype}, this run is in {dtype}"
    for key, what in (("device", "on device"), ("device_name", "on"), ("threads", "with threads:")):
        then, now = calibration.provenance.get(key), provenance.get(key)
        if then != now:
            return f"{what} {then}, this is {now}"
    return None
