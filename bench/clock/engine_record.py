"""The schema of an engine's measurement. Units stand in the keys, ``null`` is unknown, unknown keys are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Bounds(_Model):
    """What the machine allowed, the median of readings taken in turns with what stands beside them. read_gb_s: of the
    memory, 1e9 bytes; cache_read_gb_s: of half the last-level cache; fma_gflop_s: float32, two operations each;
    mma_tflop_s: on a GPU, products of halves with sums in float32, two operations each."""

    read_gb_s: Amount
    cache_read_gb_s: Amount | None
    fma_gflop_s: Amount
    mma_tflop_s: Amount | None = None

    def peak_gflop_s(self, dtype: str) -> float:
        """What multiplies weights of a dtype: on a GPU halves have units of their own."""
        return 1e3 * self.mma_tflop_s if self.mma_tflop_s and dtype == "float16" else self.fma_gflop_s


class Machine(Bounds):
    """The best readings of the whole run. copy_gb_s counts what a copy reads and what it writes. threads: on a GPU its
    multiprocessors. launch_host_us: of a GPU's kernel that does nothing, until the call returns; launch_device_us: from
    one to the next while the host is far ahead."""

    threads: Annotated[int, Field(ge=1)]
    last_level_cache_bytes: Count | None
    copy_gb_s: Amount
    launch_host_us: Amount | None = None
    launch_device_us: Amount | None = None


class Time(_Model):
    """Median over the repeats, and quartiles."""

    ms: Amount
    ms_low: Amount
    ms_high: Amount


class Bounded(Time):
    """A time beside what it was needed for. bytes, flops: ``bench.clock.shapes``. bandwidth_share: bytes per second over
    the memory's, above 1 where data comes from a cache. peak_share: operations per second over ``Bounds.peak_gflop_s``."""

    rows: Annotated[int, Field(ge=1)]
    flops: Count
    bytes: Count
    bandwidth_share: Amount
    peak_share: Amount


class Pass(Bounded):
    """A pass of all rows, all logits, behind ``context`` cached rows. roofline_ms: what the slower of reading and
    multiplying takes at the shape's bounds; reading is from the cache for a shape that fits there."""

    context: Count
    roofline_ms: Amount


class Matrix(_Model):
    """The largest matrix of a shape, (out, in)."""

    name: str
    num_out: Count
    num_in: Count


class Peer(_Model):
    """transformers and our engine at the same work, in turns. what: "generate", milliseconds per token of a whole call,
    prompt included; "step", of a pass of one row behind ``context``. trials_ms: by dtype, null where it does not run;
    theirs is the fastest of them. sleeping: whether its waiting threads soon sleep, as ours do. speedup: theirs over
    ours."""

    what: Literal["generate", "step"]
    versions: dict[str, str]
    dtype: str
    sleeping: bool
    trials_ms: dict[str, Amount | None]
    context: Count
    tokens: Count
    theirs: Time
    ours: Time
    speedup: Amount


class Host(_Model):
    """What handing a pass to a GPU takes, behind ``context`` cached rows. call: until the call returns, its kernels
    launched. queued: a pass where several wait for each other, so what the slower of host and device needs. hidden:
    the host is ahead of the device (call below queued). share: the part of a lone pass in which the device waits for
    the host: what it takes beyond a queued one where the host is ahead, else what the call takes."""

    rows: Annotated[int, Field(ge=1)]
    context: Count
    call: Time
    queued: Time
    hidden: bool
    share: Amount


class Memory(_Model):
    """Bytes. On the host, of a process of its own: before: without the backbone; peak: while it was built and ran every
    row count; after: then. On a device (``where``) the same of what Jittor took of its memory, in the timed process;
    host_growth_bytes: what the process's own memory grew by meanwhile, small where no weight stays on the host. growth:
    peak less before. ratio: growth over weights and cache. late_kernels: those that the timed process compiled or
    loaded on the clock."""

    weight_bytes: Count
    cache_bytes: Count
    before_bytes: Count
    peak_bytes: Count | None
    after_bytes: Count
    growth_bytes: Count | None
    ratio: Amount | None
    late_kernels: Count | None
    where: Literal["host", "device"] = "host"
    host_growth_bytes: Count | None = None


class Shape(_Model):
    """fits_in_cache: the weights of a pass fit into the last-level cache, whose bandwidth then bounds it. host: by rows
    behind the first context; only on a GPU, as on the CPU it is the host that computes."""

    name: str
    dtype: str
    num_layers: Count
    hidden_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    intermediate_size: Count
    vocab_size: Count
    weight_bytes: Count
    fits_in_cache: bool | None
    bounds: Bounds
    passes: list[Pass]
    largest_matrix: Matrix
    linear: list[Bounded]
    transformers: Peer | None
    memory: Memory
    host: list[Host] = Field(default_factory=list)


class Stages(_Model):
    """A decoding loop, per step: the medians over the repeats of each stage of ``decoding.generate.Timers``.

    outside_ms: accept, cache and host together. wall_gap_percent: the part of an outer clock's time that the stages do
    not account for.
    """

    nodes: Annotated[int, Field(ge=1)]
    tokens: Count
    steps: Count
    tokens_per_s: Amount
    step_ms: Amount
    draft_ms: Amount
    verify_ms: Amount
    accept_ms: Amount
    cache_ms: Amount
    host_ms: Amount
    outside_ms: Amount
    wall_gap_percent: float


class Soak(_Model):
    """Many steps, text after text of other lengths. Bytes of the process after the warm-up, half-way and at the end."""

    steps: Count
    texts: Count
    start_bytes: Count
    middle_bytes: Count
    end_bytes: Count
    late_kernels: Count | None


class Loop(_Model):
    """empty_pass: one row through a backbone of as many layers whose matrices are 16 by 16: launches, barriers, Python.
    head: the untrained head that drafted."""

    backbone: str
    dtype: str
    head: str
    empty_pass: Time
    autoregressive: Stages
    tree: Stages
    late_kernels: Count | None
    soak: Soak | None


class EngineRecord(_Model):
    """An engine's measurement. notes: what was left out, and why."""

    schema_version: Literal[1]
    kind: Literal["engine"]
    provenance: dict[str, Any]
    device: str
    repeats: Annotated[int, Field(ge=1)]
    machine: Machine
    shapes: list[Shape]
    loop: Loop | None
    notes: list[str]


def parse_engine_record(data: dict, where: str | Path = "record") -> EngineRecord:
    """A checked record. Raises ValueError naming ``where`` and the first field that does not fit."""
    try:
        return EngineRecord.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise ValueError(f"{where}: {field}: {first['msg']}") from error


def read_engine_record(path: str | Path) -> EngineRecord:
    """Read a file. Raises ValueError naming it when it is no such record, OSError when it cannot be read."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: malformed JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a result is a JSON object, got a {type(data).__name__}")
    return parse_engine_record(data, path)
