"""What a result might come to on another machine, whose passes ``bench/engine.py`` has timed. No measurement.

With the accept length a as measured, the tree's rows r, and the other machine's milliseconds c of a pass over so many:

    pass = c(r) + m c(1)        m: the measured draft seconds of a pass over the measured seconds of a one-row pass
    speedup = a c(1) / pass

So three things are assumed. The other machine accepts what this one did: the text is a property of the backbone, and a
curve of another shape says what such a tree would cost there, not what such a backbone would accept. Drafting keeps
its price in one-row passes, which is too much where a head is small beside the backbone; the speedup with free drafts,
a c(1) / c(r), is the bound from above. And a pass is nothing but both. c is interpolated between the rows that were
timed and not continued behind them.

Accept lengths that others have published (``bench/tables/published.py``) are projected likewise, with a draft that
takes as long as reading its weights at the bandwidth that was measured beside the curve:

    speedup = a c(1) / (c(r) + draft bytes / bandwidth)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from bench.record.schema import Record
from bench.tables.published import PUBLISHED, Published
from bench.tables.summary import Result, format_number, num_passes, parity_failed

ASSUMED = (
    "projection: accept length as measured; a draft costs as many one-row passes as it did, which is too much where "
    "the backbone is larger (with free drafts: the bound from above); nothing else of a pass counts"
)

PUBLISHED_SHAPE = "7b"
PUBLISHED_CONTEXT = 512  # rows in the cache half-way through a turn of MT-bench, about
PUBLISHED_ASSUMED = (
    "projection of published results: accept lengths as published (temperature 0, batch 1), not measured here; trees "
    "as published or, for Hydra, taken to be Medusa's; a draft takes as long as reading its weights (halves) once for "
    "each use at the bandwidth measured beside the curve; nothing else of a pass counts"
)


@dataclass(frozen=True)
class Profile:
    """One shape of an engine's measurement. curves: for each context, (rows, milliseconds), rows ascending. read_gb_s:
    what the memory gave meanwhile, where the file says so."""

    path: str
    device: str
    shape: str
    dtype: str
    curves: dict[int, tuple[list[int], list[float]]]
    read_gb_s: float | None = None

    def nearest(self, context: float) -> int:
        """The context timed that is nearest to this one; of equals the shorter."""
        return min(sorted(self.curves), key=lambda each: abs(each - context))

    def ms(self, num_rows: int, context: int) -> float | None:
        """Milliseconds of a pass, interpolated in rows; None outside the rows that were timed."""
        rows, milliseconds = self.curves[context]
        return float(np.interp(num_rows, rows, milliseconds)) if rows[0] <= num_rows <= rows[-1] else None


@dataclass(frozen=True)
class Projection:
    """A result on another machine. draft_passes: m above; context: of the curve used. refused: why there are no
    figures, else None."""

    label: str
    nodes: int
    accept_length: float | None = None
    draft_passes: float | None = None
    context: int | None = None
    verify_ms: float | None = None
    pass_ms: float | None = None
    tokens_per_s: float | None = None
    speedup: float | None = None
    speedup_free_drafts: float | None = None
    refused: str | None = None


def read_profile(path: str, shape: str | None = None) -> Profile:
    """A shape of an engine's file, the first without a name. Raises ValueError naming the file, OSError."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: malformed JSON: {error}") from error
    if not isinstance(data, Mapping) or data.get("kind") != "engine" or data.get("schema_version") != 1:
        raise ValueError(f"{path}: a profile is a result of bench/engine.py, of kind 'engine' and schema_version 1")
    try:
        shapes = {each["name"]: each for each in data["shapes"]}
        if shape is not None and shape not in shapes:
            raise ValueError(f"{path}: no shape {shape!r}; there are {', '.join(shapes)}")
        chosen = shapes[shape or next(iter(shapes), None)]
        device = (data.get("provenance") or {}).get("device_name") or data["device"]
        read_gb_s = (chosen.get("bounds") or {}).get("read_gb_s")
        return Profile(path, device, chosen["name"], chosen["dtype"], _curves(chosen["passes"]), read_gb_s)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a profile needs shapes with name, dtype and passes of rows, context, ms") from error


def _curves(passes: Sequence[Mapping]) -> dict[int, tuple[list[int], list[float]]]:
    """By context; only those that have a one-row pass."""
    points: dict[int, dict[int, float]] = {}
    for each in passes:
        points.setdefault(int(each["context"]), {})[int(each["rows"])] = float(each["ms"])
    curves = {context: tuple(zip(*sorted(found.items()), strict=True)) for context, found in points.items()}
    kept = {context: (list(rows), list(ms)) for context, (rows, ms) in curves.items() if rows[0] == 1}
    if not kept or any(value <= 0 for _, ms in kept.values() for value in ms):
        raise KeyError("ms")
    return kept


def typical_context(record: Record) -> float:
    """Rows in the cache half-way through a turn, on average."""
    rows = record.per_prompt
    return sum(row.prompt_tokens + row.tokens / 2 for row in rows) / max(1, sum(row.turns for row in rows))


def project(result: Result, profile: Profile) -> Projection:
    """One result on the profile's machine."""
    record = result.record
    nodes, length, baseline = record.config.decoding.num_nodes, record.metrics.accept_length, record.baseline
    if parity_failed(record):
        return Projection(result.label, nodes, refused="parity failed")
    if length is None or record.timing.draft_s is None:
        return Projection(result.label, nodes, refused="nothing measured")
    draft_passes = 0.0
    if nodes > 1:
        if baseline is None or not baseline.tokens or not baseline.total_s:
            return Projection(result.label, nodes, refused="no baseline to express drafting in")
        draft_passes = record.timing.draft_s / num_passes(record) / (baseline.total_s / baseline.tokens)
    context = profile.nearest(typical_context(record))
    one, verify = profile.ms(1, context), profile.ms(nodes, context)
    if verify is None:
        return Projection(result.label, nodes, refused=f"the profile ends at {profile.curves[context][0][-1]} rows")
    whole = verify + draft_passes * one
    return Projection(
        label=result.label,
        nodes=nodes,
        accept_length=length,
        draft_passes=draft_passes,
        context=context,
        verify_ms=verify,
        pass_ms=whole,
        tokens_per_s=1e3 * length / whole,
        speedup=length * one / whole,
        speedup_free_drafts=length * one / verify,
    )


def projection_table(projections: Sequence[Projection], profile: Profile) -> Table:
    """One row per result; nothing in it but what went in was measured."""
    title = f"Projection, not measured: {profile.shape}, {profile.dtype}, on {profile.device} ({profile.path})"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("head")
    names = ("rows", "accept length", "draft (one-row passes)", "verify ms", "pass ms", "tokens/s", "speedup")
    for name in (*names, "with free drafts", "context"):
        table.add_column(name, justify="right")
    for each in projections:
        figures = (each.accept_length, each.draft_passes, each.verify_ms, each.pass_ms, each.tokens_per_s)
        cells = [each.label, str(each.nodes), *map(format_number, figures)]
        cells.append(each.refused or format_number(each.speedup))
        cells += [format_number(each.speedup_free_drafts), "-" if each.context is None else str(each.context)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def projection_warnings(results: Sequence[Result], profile: Profile) -> list[str]:
    """What keeps a projection from being taken at its word."""
    found = []
    for result in results:
        backbone, decoding = result.record.config.backbone, result.record.config.decoding
        if Path(backbone.path).name != profile.shape:
            found.append(
                f"projection: {result.label} was measured on {Path(backbone.path).name} ({backbone.num_layers} layers, "
                f"{backbone.hidden_size} wide), the profile is of {profile.shape}: another backbone accepts otherwise"
            )
        if decoding.tree is None:
            found.append(f"projection: the tree of {result.label} changes by step; {decoding.num_nodes} rows are used")
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class PublishedProjection:
    """A published result on the profile's machine. refused: why there is no speedup, else None."""

    name: str
    backbone: str
    accept_length: float
    rows: int
    draft_mb: float
    source: str
    published_speedup: float | None
    context: int
    verify_ms: float | None = None
    draft_ms: float | None = None
    speedup: float | None = None
    refused: str | None = None


def project_published(profile: Profile, results: Sequence[Published] = PUBLISHED) -> list[PublishedProjection]:
    """Every published result on a curve of the 7b shape. Raises ValueError for another shape, and for a profile that
    does not say what the memory gave.

    Worked example: 4 tokens a pass; passes of 5 ms for 1 row and 6 ms for the tree's; a draft of 2 GB at 2000 GB/s
    takes 1 ms: 4 * 5 / (6 + 1) = 2.86.
    """
    if profile.shape != PUBLISHED_SHAPE:
        raise ValueError(
            f"{profile.path}: published accept lengths are those of a 7B backbone, the profile is of {profile.shape}; "
            "give --profile-shape 7b, or a profile of bench/engine.py --shape 7b"
        )
    if not profile.read_gb_s:
        raise ValueError(f"{profile.path}: it does not say what the memory gave (bounds.read_gb_s); measure it again")
    context = profile.nearest(PUBLISHED_CONTEXT)
    one, found = profile.ms(1, context), []
    for each in results:
        verify, draft = profile.ms(each.rows, context), each.draft_bytes / profile.read_gb_s / 1e6
        known = each.name, each.backbone, each.accept_length, each.rows, each.draft_bytes / 1e6, each.source
        row = PublishedProjection(*known, each.speedup, context)
        if verify is None:
            ends = profile.curves[context][0][-1]
            found.append(dataclasses.replace(row, refused=f"the profile ends at {ends} rows"))
            continue
        speedup = each.accept_length * one / (verify + draft)
        found.append(dataclasses.replace(row, verify_ms=verify, draft_ms=draft, speedup=speedup))
    return found


def published_table(projections: Sequence[PublishedProjection], profile: Profile) -> Table:
    """One row per published result; the speedup is projected, and the published one is another machine's."""
    context = projections[0].context
    title = f"Projection of published accept lengths, not measured: {profile.shape}, {profile.dtype}, behind {context} "
    table = Table(title=title + f"rows, on {profile.device} ({profile.path})", title_justify="left", title_style="bold")
    table.add_column("system")
    table.add_column("backbone")
    for name in ("accept length", "rows", "draft MB", "draft ms", "verify ms", "projected speedup"):
        table.add_column(name, justify="right")
    table.add_column("published speedup, elsewhere", justify="right")
    table.add_column("source")
    for each in projections:
        figures = [format_number(each.accept_length), str(each.rows), f"{each.draft_mb:.0f}"]
        figures += [format_number(value) for value in (each.draft_ms, each.verify_ms)]
        figures += [each.refused or format_number(each.speedup), format_number(each.published_speedup)]
        table.add_row(*(Text(cell) for cell in (each.name, each.backbone, *figures, each.source)))
    return table
