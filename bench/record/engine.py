"""The schema of an engine measurement (``bench/engine.py``): what passes cost, beside what the machine allows."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from runtime.records import Amount, Count, FileRecord, Model


class Bounds(Model):
    """What the machine allowed: medians of readings interleaved with the measurement. read_gb_s: from memory, 1e9
    bytes; cache_read_gb_s: from half the last-level cache; fma_gflop_s: float32 multiply-adds, two operations each;
    mma_tflop_s: on a GPU, products of halves with float32 sums, two operations each."""

    read_gb_s: Amount
    cache_read_gb_s: Amount | None
    fma_gflop_s: Amount
    mma_tflop_s: Amount | None = None

    def peak_gflop_s(self, dtype: str) -> float:
        """The peak for weights of a dtype; on a GPU, halves have tensor cores."""
        return 1e3 * self.mma_tflop_s if self.mma_tflop_s and dtype == "float16" else self.fma_gflop_s


class Machine(Bounds):
    """The best readings of the run. copy_gb_s counts bytes read and written. threads: on a GPU its multiprocessors.
    launch_host_us: of an empty GPU kernel, until the call returns; launch_device_us: from one kernel to the next while
    the host is far ahead."""

    threads: Annotated[int, Field(ge=1)]
    last_level_cache_bytes: Count | None
    copy_gb_s: Amount
    launch_host_us: Amount | None = None
    launch_device_us: Amount | None = None


class Time(Model):
    """Median over the repeats, and quartiles."""

    ms: Amount
    ms_low: Amount
    ms_high: Amount


class Bounded(Time):
    """A time and the work done in it. bytes, flops: ``bench.clock.shapes``. bandwidth_share: bytes per second over the
    memory's, above 1 if data comes from a cache. peak_share: operations per second over ``Bounds.peak_gflop_s``."""

    rows: Annotated[int, Field(ge=1)]
    flops: Count
    bytes: Count
    bandwidth_share: Amount
    peak_share: Amount


class Pass(Bounded):
    """A pass over ``rows`` rows, with all logits, after ``context`` cached rows. roofline_ms: what the slower of
    reading and multiplying takes at the shape's bounds; a shape that fits into the cache is read from there."""

    context: Count
    roofline_ms: Amount


class Matrix(Model):
    """The largest matrix of a shape, (out, in)."""

    name: str
    num_out: Count
    num_in: Count


class Peer(Model):
    """transformers and our engine at the same work, interleaved. what: "generate", milliseconds per token of a complete
    call, prompt included; "step", of a pass of one row after ``context``. trials_ms: by dtype, null if it does not run;
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


class Host(Model):
    """What launching a pass on a GPU costs, after ``context`` cached rows. call: until the call returns, its kernels
    launched. queued: a pass among several in a row, so what the slower of host and device takes. hidden: the host is
    ahead of the device (call below queued). share: the part of a lone pass in which the device waits for the host."""

    rows: Annotated[int, Field(ge=1)]
    context: Count
    call: Time
    queued: Time
    hidden: bool
    share: Amount


class Memory(Model):
    """Bytes. On the host, of a separate process: before the backbone was built, at the peak while it was built and ran
    every row count, and after. On a device (``where``), of what Jittor took of its memory in the timed process;
    host_growth_bytes: by what the memory of that process grew, small if no weight stays on the host. growth: peak minus
    before. ratio: growth over weights and cache. late_kernels: kernels compiled or loaded on the clock."""

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


class Shape(Model):
    """fits_in_cache: the weights of a pass fit into the last-level cache, whose bandwidth then bounds it. host: on a
    GPU only, by rows, after the first context."""

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


class Stages(Model):
    """A decoding loop, per step: the medians over the repeats of each stage of ``decoding.generate.Timers``.

    outside_ms: accept, cache and host together. wall_gap_percent: the part of the wall clock that no stage accounts
    for.
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


class Soak(Model):
    """Many steps over texts of different lengths. Bytes of the process after the warm-up, half-way and at the end."""

    steps: Count
    texts: Count
    start_bytes: Count
    middle_bytes: Count
    end_bytes: Count
    late_kernels: Count | None


class Loop(Model):
    """empty_pass: one row through a backbone of as many layers whose matrices are 16 by 16: launches, barriers, Python.
    head: the (untrained) head that drafted."""

    backbone: str
    dtype: str
    head: str
    empty_pass: Time
    autoregressive: Stages
    tree: Stages
    late_kernels: Count | None
    soak: Soak | None


class EngineRecord(FileRecord):
    """An engine measurement. notes: what was left out, and why."""

    KIND: ClassVar[str] = "engine"

    schema_version: Literal[1]
    kind: Literal["engine"]
    provenance: dict[str, Any]
    device: str
    repeats: Annotated[int, Field(ge=1)]
    machine: Machine
    shapes: list[Shape]
    loop: Loop | None
    notes: list[str]
