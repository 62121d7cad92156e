"""The schema of a result: one JSON file per measurement, everything needed to judge its numbers inside.

Units stand in the keys (``time_s`` is seconds), ``null`` is unknown, unknown keys are refused, and per-prompt
rows are kept so that intervals can be recomputed without running anything again. Fields with a default came later:
a file without them is read as if it held the default.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION = 1
KIND = "generation"

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[float, float]


# How the matrices of the backbone's layers are kept, and by whom where that is not our engine.
Storage = Literal["float16", "float32", "int8", "nf4", "torch-float16", "torch-float32", "torch-int8", "torch-nf4"]


class OtherKindError(ValueError):
    """The file is a result of another kind than the reader wants. ``kind``: what it says it is."""

    def __init__(self, path: str | Path, kind: str):
        super().__init__(f"{path}: its kind is {kind!r}, not {KIND!r}")
        self.kind = kind


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class BackboneInfo(_Model):
    path: str
    fingerprint: str
    dtype: str
    hidden_size: Count
    num_layers: Count
    vocab_size: Count
    engine: Literal["jittor", "torch"]
    storage: Storage | None = None


class Decoding(_Model):
    """num_nodes counts the root; tree lists the paths of child ranks below it, null when it changes by step; then
    tree_width nodes are expanded at each depth and nodes below min_confidence left out. batch_size: prompts that were
    decoded at once. draft_dtype: of the matrices where the head drafted a chain in one call, null where it did not.

    accept: how drafts were accepted, ``bench.measure.rules``; greedy says whether it is that. draft: the head's best
    guesses or drawn ones. temperature, top_p, top_k: of drawn texts, null for greedy ones; epsilon, alpha: of typical acceptance.
    """

    greedy: bool
    max_new_tokens: Count
    num_nodes: Count
    tree_depth: Count
    tree: list[list[Count]] | None
    cache_length: Count | None
    template: str | None
    tree_width: Count | None = None
    min_confidence: Rate | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1
    accept: Literal["greedy", "lossless", "typical"] = "greedy"
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Rate | None = None
    top_k: Count | None = None
    draft: Literal["top", "sampled"] = "top"
    epsilon: Rate | None = None
    alpha: Annotated[float, Field(ge=0)] | None = None
    draft_dtype: Literal["float16", "float32"] | None = None

    @model_validator(mode="after")
    def _greedy_is_a_rule(self):
        if self.greedy != (self.accept == "greedy"):
            raise ValueError(f"greedy is {self.greedy}, accept {self.accept!r}")
        if not self.greedy and self.temperature is None:
            raise ValueError(f"accept is {self.accept!r}, but there is no temperature")
        return self


class RunConfig(_Model):
    """head: the head's resolved options. repeats: how often each prompt was timed; rows keep the median."""

    backbone: BackboneInfo
    decoding: Decoding
    head: dict[str, Any]
    repeats: Annotated[int, Field(ge=1)]


class Checkpoint(_Model):
    """train_steps, train_tokens, train_s: of the whole run. seed: the training's. expected_accept_length: tokens per
    pass on held-out text with a tree of ``tree_nodes`` nodes, as the training scored the kept checkpoint."""

    path: str
    sha256: str
    parameters: Count
    train_steps: Count | None
    train_tokens: Count | None
    train_s: Seconds | None
    seed: Count | None = None
    expected_accept_length: float | None = None
    tree_nodes: Count | None = None


class Data(_Model):
    """num_prompts: prompts asked of the run. dropped: reason -> how many the file lost while being read."""

    path: str
    sha256: str
    num_prompts: Count
    dropped: dict[str, Count]


class Baseline(_Model):
    """Autoregressive decoding by the unchanged backbone in the same process. pass_s: median seconds per pass;
    total_s: prefill left out."""

    tokens_per_s: Seconds | None
    pass_s: Seconds | None
    total_s: Seconds | None
    tokens: Count


class Metrics(_Model):
    """Defined in ``bench.record.metrics``. accept_rate[d]: depth d + 1 accepted, given that depth d was; null untried.
    total_variation: mean over emitted tokens, of a rule that changes the distribution."""

    accept_length: Annotated[float, Field(ge=0)] | None
    accept_rate: list[Rate | None]
    tokens_per_s: Seconds | None
    speedup: Seconds | None
    speedup_ci: Interval | None
    accept_length_ci: Interval | None
    overhead: Seconds | None
    tokens: Count
    passes: Count
    total_variation: Rate | None = None


class Timing(_Model):
    """Seconds summed over the rows of per_prompt; total_s includes prefill_s."""

    prefill_s: Seconds | None
    draft_s: Seconds | None
    verify_s: Seconds | None
    accept_s: Seconds | None
    cache_s: Seconds | None
    host_s: Seconds | None
    total_s: Seconds | None


class FirstDifference(_Model):
    """position counts generated tokens; a token is null where that side had already ended. baseline_token: what
    autoregressive decoding by the head's backbone gave."""

    prompt_id: str
    position: Count
    baseline_token: Count | None
    head_token: Count | None
    logit_gap: float | None


class Parity(_Model):
    """Of ``prompts`` compared with greedy autoregressive decoding by the same backbone, ``identical`` agreed token for
    token. A head that adapts the backbone is compared with the adapted one."""

    prompts: Count
    identical: Count
    first_difference: FirstDifference | None

    @model_validator(mode="after")
    def _identical_is_a_part(self):
        if self.identical > self.prompts:
            raise ValueError(f"identical ({self.identical}) exceeds prompts ({self.prompts})")
        return self


class Adaptation(_Model):
    """What a head that adapts the backbone did to its greedy text, as ``bench.record.metrics.agreement`` defines it.

    stats: the checkpoint's figures about it. greedy_agreement: share of the prompts whose text, all turns, is the
    original backbone's token for token. token_agreement: tokens before the first difference of each turn, over the
    original's tokens.
    """

    stats: dict[str, Any]
    greedy_agreement: Rate | None
    token_agreement: Rate | None


class Quantization(_Model):
    """What keeping the layers' matrices in fewer bits did to the backbone; before and after.

    layer_bytes: of the layers' weights. perplexity: of the assistant's tokens in the held-out conversations of the
    embedded corpus. greedy_agreement: share of the prompts whose first reply is the original backbone's token for
    token; token_agreement: tokens before the first difference, over the original's.
    """

    bits: Annotated[int, Field(ge=1)]
    layer_bytes_before: Count
    layer_bytes_after: Count
    perplexity_before: Annotated[float, Field(gt=0)]
    perplexity_after: Annotated[float, Field(gt=0)]
    greedy_agreement: Rate | None
    token_agreement: Rate | None


class Failure(_Model):
    prompt_id: str
    error: str


class CategoryResult(_Model):
    prompts: Count
    tokens: Count
    passes: Count
    accept_length: Annotated[float, Field(ge=0)] | None
    tokens_per_s: Seconds | None
    speedup: Seconds | None


class AdaptedText(_Model):
    """Autoregressive decoding by the adapted backbone. tokens: of the decoding passes. agreeing_tokens: before the
    first difference from the original's text, summed over the turns; here a turn's first token counts too."""

    tokens: Count
    agreeing_tokens: Count


class PromptRow(_Model):
    """One prompt, its turns summed. All sides read the same prompts and count alike.

    tokens, passes, time_s: of the decoding passes; the prefill, its seconds and its token are left out.
    reached_by_depth[d]: passes that had depth d accepted (depth 0 is the root) and a candidate at depth d + 1;
    accepted_by_depth[d]: those of them in which depth d + 1 was accepted. baseline_*: null when not measured.
    identical: the tokens equal those of autoregressive decoding by the same backbone, which is the baseline unless
    ``adapted`` is there; null when there is nothing to compare (drawn texts). total_variation: summed over the tokens
    that passes emitted, how far the choice of each was from a draw; null for rules that are exact.
    """

    prompt_id: str
    category: str
    turns: Count
    prompt_tokens: Count
    tokens: Count
    passes: Count
    accepted_by_depth: list[Count]
    reached_by_depth: list[Count]
    accept_length: Annotated[float, Field(ge=0)] | None
    time_s: Seconds
    baseline_tokens: Count | None
    baseline_passes: Count | None
    baseline_time_s: Seconds | None
    draft_s: Seconds | None
    verify_s: Seconds | None
    identical: bool | None
    finish_reason: str
    adapted: AdaptedText | None = None
    total_variation: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _counts_agree(self):
        accepted, reached = self.accepted_by_depth, self.reached_by_depth
        if len(accepted) != len(reached) or any(a > r for a, r in zip(accepted, reached, strict=True)):
            raise ValueError(f"accepted_by_depth {accepted} does not fit reached_by_depth {reached}")
        if any(deeper > above for deeper, above in zip(reached[1:], accepted, strict=False)):
            raise ValueError(f"a depth was reached more often than the one above was accepted: {reached}, {accepted}")
        twin, whose = self.baseline_tokens, "baseline"
        if self.adapted:
            twin, whose = self.adapted.tokens, "adapted backbone"
            most = self.turns + min(twin, twin if self.baseline_tokens is None else self.baseline_tokens)
            if self.adapted.agreeing_tokens > most:
                raise ValueError(f"agreeing_tokens is {self.adapted.agreeing_tokens}, of at most {most}")
        if self.identical and twin not in (None, self.tokens):
            raise ValueError(f"identical, but {self.tokens} tokens against the {whose}'s {twin}")
        return self


class Prediction(_Model):
    """What the head's calibration said of this tree beforehand; see ``bench.measure.calibration``.

    tokens_per_s: as timed on the calibration's texts. prompts_sha256: of its prompts. same_machine: whether device,
    dtype and threads are those of this run.
    """

    accept_length: Annotated[float, Field(ge=0)]
    accept_length_ci: Interval | None
    tokens_per_s: Seconds
    autoregressive_tokens_per_s: Seconds
    calibration: str
    prompts_sha256: str
    same_machine: bool


class Record(_Model):
    """A result file. baseline and parity are null in the record of the autoregressive baseline itself, parity also
    where texts are drawn.

    checkpoint: null also for a head that drafts without one, having nothing to train. head_stats: what the head said
    of itself on its held-out text. adaptation: null for a head that leaves the backbone as it is. quantization: null
    for a backbone whose weights are kept as they were read.
    """

    schema_version: Literal[1]
    kind: Literal["generation"]
    status: Literal["complete", "interrupted"]
    head: str
    config: RunConfig
    provenance: dict[str, Any]
    checkpoint: Checkpoint | None
    data: Data
    baseline: Baseline | None
    metrics: Metrics
    timing: Timing
    parity: Parity | None
    failures: list[Failure]
    categories: dict[str, CategoryResult]
    per_prompt: list[PromptRow]
    head_stats: dict[str, Any] = Field(default_factory=dict)
    adaptation: Adaptation | None = None
    prediction: Prediction | None = None
    quantization: Quantization | None = None

    @model_validator(mode="after")
    def _prompt_ids_are_unique(self):
        ids = [row.prompt_id for row in self.per_prompt]
        if len(set(ids)) != len(ids):
            repeated = next(name for name in ids if ids.count(name) > 1)
            raise ValueError(f"per_prompt holds {repeated!r} twice")
        return self


def parse_record(data: Mapping[str, Any] | Record, where: str | Path = "record") -> Record:
    """A checked Record from plain data; NumPy numbers, tuples, paths and the models above are taken as they are.

    Raises ValueError naming ``where`` and the fields that do not fit.
    """
    if isinstance(data, Record):
        return data
    try:
        return Record.model_validate_json(json.dumps(data, default=_plain))
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from error
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def to_json(record: Record | Mapping[str, Any], indent: int | None = None) -> str:
    """The record as JSON text, on one line unless ``indent`` is given. Raises ValueError when it does not fit."""
    return json.dumps(parse_record(record).model_dump(mode="json"), indent=indent, ensure_ascii=False, allow_nan=False)


def write_record(record: Record | Mapping[str, Any], path: str | Path) -> None:
    """Check a record and write it, whole or not at all; the parent folder is made.

    Raises ValueError for a record that does not fit the schema and OSError when the file cannot be written.
    """
    write_atomically(path, to_json(parse_record(record, path), indent=1) + "\n")


def read_record(path: str | Path) -> Record:
    """Read one result.

    Raises OtherKindError for a result of another kind, ValueError naming the file and what is wrong with it,
    OSError when it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a result is a JSON object, got a {type(data).__name__}")
    if isinstance(data.get("kind"), str) and data["kind"] != KIND:
        raise OtherKindError(path, data["kind"])
    if data.get("schema_version") != SCHEMA_VERSION:
        found = data.get("schema_version", "missing")
        raise ValueError(f"{path}: schema_version is {found!r}; this version of the code reads {SCHEMA_VERSION}")
    return parse_record(data, path)


def check_writable(path: str | Path) -> None:
    """Make sure that ``path`` can be written, before the work whose result goes there. Makes the parent folder.

    Raises OSError saying what is in the way.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        trial = _temporary(path)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a temporary file in the same folder, then a rename.

    Raises OSError naming the file; whatever stood there before is then untouched.
    """
    path = Path(path)
    check_writable(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _plain(value: object) -> object:
    """What json.dumps does not know by itself."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def explain(error: ValidationError, most: int = 3) -> str:
    """The first few problems of a validation error on one line, each with its field."""
    problems = []
    for problem in error.errors()[:most]:
        field = ".".join(str(part) for part in problem["loc"]) or "record"
        message = problem["msg"].removeprefix("Value error, ")
        got = problem["input"]
        shown = f" (got {got!r})" if isinstance(got, str | int | float | bool | None) and len(repr(got)) < 60 else ""
        problems.append(f"{field}: {message}{shown}")
    rest = error.error_count() - most
    return "; ".join(problems) + (f"; and {rest} more" if rest > 0 else "")
