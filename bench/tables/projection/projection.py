"""What a result might come to on another machine, whose passes ``bench/engine.py`` has timed. No measurement.

With the accept length a as measured, the tree's rows r, and the other machine's milliseconds c of a pass by rows:

    pass = c(r) + m c(1)        m: the measured draft seconds of a pass over the measured seconds of a one-row pass
    speedup = a c(1) / pass

Three things are assumed. The other machine accepts what this one did: the text is a property of the backbone, and a
curve of another shape says what such a tree would cost there, not what such a backbone would accept. Drafting keeps its
price in one-row passes, which is too much if a head is small beside the backbone; the speedup with free drafts,
a c(1) / c(r), is the upper bound. And a pass consists of these two parts. c is interpolated between the rows that were
timed and not extrapolated.

Published accept lengths (``published.py``) are projected the same way, with a draft that takes as long as reading its
weights at the bandwidth measured beside the curve:

    speedup = a c(1) / (c(r) + draft bytes / bandwidth)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bench.record.engine import EngineRecord
from bench.tables.numbers import format_number
from bench.tables.projection.published import PUBLISHED, Published
from bench.tables.terminal import show_table

ASSUMED = (
    "projection: accept length as measured; a draft costs as many one-row passes as it did, which is too much where "
    "the backbone is larger (with free drafts: the upper bound); nothing else of a pass counts"
)

PUBLISHED_SHAPE = "7b"
PUBLISHED_CONTEXT = 512  # rows in the cache half-way through a turn of MT-bench, roughly
PUBLISHED_ASSUMED = (
    "projection of published results: accept lengths as published (temperature 0, batch 1), not measured here; trees "
    "as published or, for Hydra, taken to be Medusa's; a draft takes as long as reading its weights (halves) once for "
    "each use at the bandwidth measured beside the curve; nothing else of a pass counts"
)


@dataclass(frozen=True)
class Profile:
    """One shape of an engine measurement. curves: milliseconds by rows, a series per context. read_gb_s: bandwidth of
    the memory meanwhile."""

    path: str
    device: str
    shape: str
    dtype: str
    curves: dict[int, pd.Series]
    read_gb_s: float

    def nearest(self, context: float) -> int:
        """The timed context nearest to this one; of equals the shorter."""
        return min(sorted(self.curves), key=lambda each: abs(each - context))

    def ms(self, num_rows: int, context: int) -> float | None:
        """Milliseconds of a pass, interpolated in rows; None outside the rows that were timed."""
        curve = self.curves[context]
        inside = curve.index[0] <= num_rows <= curve.index[-1]
        return float(np.interp(num_rows, curve.index, curve)) if inside else None

    def refusal(self, context: int) -> str:
        """Why a tree is not projected."""
        return f"the profile ends at {self.curves[context].index[-1]} rows"


def read_profile(path: str, name: str | None = None) -> Profile:
    """A shape of an engine measurement, the first without a name. Raises ValueError naming the file, OSError."""
    record = EngineRecord.read(path)
    shapes = {shape.name: shape for shape in record.shapes}
    if (name is not None and name not in shapes) or not shapes:
        raise ValueError(f"{path}: no shape {name!r}; there are {', '.join(shapes) or 'none'}")
    shape = shapes[name or next(iter(shapes))]
    passes = pd.DataFrame(
        [(each.context, each.rows, each.ms) for each in shape.passes], columns=["context", "rows", "ms"]
    )
    curves = {
        int(context): group.drop_duplicates("rows", keep="last").set_index("rows")["ms"].sort_index()
        for context, group in passes.groupby("context")
        if 1 in set(group["rows"])
    }
    if not curves or not all((curve > 0).all() for curve in curves.values()):
        raise ValueError(f"{path}: a profile needs passes of one row, and times above 0 ms")
    device = record.provenance.get("device_name") or record.device
    return Profile(path, device, shape.name, shape.dtype, curves, shape.bounds.read_gb_s)


def project(frame: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """The results on the profile's machine. frame: of ``bench.tables.results``.

    draft_passes: m above; context: of the curve used; refused: why there are no figures, else None.
    """
    columns = ["label", "nodes", "accept_length", "draft_passes", "context", "verify_ms", "pass_ms", "tokens_per_s",
               "speedup", "speedup_free_drafts", "refused"]  # fmt: skip
    rows = [{"label": row.label, "nodes": row.nodes, **_project(row, profile)} for row in frame.itertuples()]
    return pd.DataFrame(rows, columns=columns).astype({"context": "Int64"})


def _project(row, profile: Profile) -> dict:
    if row.parity_failed:
        return {"refused": "parity failed"}
    if pd.isna(row.accept_length) or pd.isna(row.draft_s):
        return {"refused": "nothing measured"}
    draft_passes = 0.0
    if row.nodes > 1:
        if pd.isna(row.baseline_s_per_token):
            return {"refused": "no baseline to express drafting in"}
        draft_passes = row.draft_s / row.passes / row.baseline_s_per_token
    context = profile.nearest(row.context_rows)
    one, verify = profile.ms(1, context), profile.ms(row.nodes, context)
    if verify is None:
        return {"refused": profile.refusal(context)}
    pass_ms = verify + draft_passes * one
    return {
        "accept_length": row.accept_length,
        "draft_passes": draft_passes,
        "context": context,
        "verify_ms": verify,
        "pass_ms": pass_ms,
        "tokens_per_s": 1e3 * row.accept_length / pass_ms,
        "speedup": row.accept_length * one / pass_ms,
        "speedup_free_drafts": row.accept_length * one / verify,
    }


def show_projection(projected: pd.DataFrame, profile: Profile) -> None:
    """Print one row per result, and what is assumed."""
    title = f"Projection, not measured: {profile.shape}, {profile.dtype}, on {profile.device} ({profile.path})"
    cells = [
        {
            "head": row.label,
            "rows": str(row.nodes),
            "accept length": format_number(row.accept_length),
            "draft (one-row passes)": format_number(row.draft_passes),
            "verify ms": format_number(row.verify_ms),
            "pass ms": format_number(row.pass_ms),
            "tokens/s": format_number(row.tokens_per_s),
            "speedup": format_number(row.speedup) if pd.isna(row.refused) else row.refused,
            "with free drafts": format_number(row.speedup_free_drafts),
            "context": "-" if pd.isna(row.context) else str(row.context),
        }
        for row in projected.itertuples()
    ]
    show_table(title, pd.DataFrame(cells), ["head"])
    print(ASSUMED)


def projection_warnings(frame: pd.DataFrame, profile: Profile) -> list[str]:
    """Why a projection should not be taken at face value."""
    found = []
    for row in frame.itertuples():
        if row.backbone != profile.shape:
            found.append(
                f"projection: {row.label} was measured on {row.backbone} ({row.num_layers} layers, {row.hidden_size} "
                f"wide), the profile is of {profile.shape}: another backbone accepts other drafts"
            )
        if row.tree_kind == "dynamic":
            found.append(f"projection: the tree of {row.label} changes from step to step; {row.nodes} rows are used")
    return list(dict.fromkeys(found))


def project_published(profile: Profile, results: Sequence[Published] = PUBLISHED) -> pd.DataFrame:
    """Every published result on a curve of the 7b shape. Raises ValueError for another shape.

    Worked example: 4 tokens a pass; passes of 5 ms for 1 row and 6 ms for the tree's; a draft of 2 GB at 2000 GB/s
    takes 1 ms: 4 * 5 / (6 + 1) = 2.86.
    """
    if profile.shape != PUBLISHED_SHAPE:
        raise ValueError(
            f"{profile.path}: published accept lengths are those of a 7B backbone, the profile is of {profile.shape}; "
            "give --profile-shape 7b, or a profile of bench/engine.py --shape 7b"
        )
    context = profile.nearest(PUBLISHED_CONTEXT)
    one, rows = profile.ms(1, context), []
    for each in results:
        verify, draft = profile.ms(each.rows, context), each.draft_bytes / profile.read_gb_s / 1e6
        known = verify is not None
        rows.append(
            {
                "name": each.name,
                "backbone": each.backbone,
                "accept_length": each.accept_length,
                "rows": each.rows,
                "draft_mb": each.draft_bytes / 1e6,
                "source": each.source,
                "published_speedup": each.speedup,
                "context": context,
                "verify_ms": verify,
                "draft_ms": draft if known else None,
                "speedup": each.accept_length * one / (verify + draft) if known else None,
                "refused": None if known else profile.refusal(context),
            }
        )
    return pd.DataFrame(rows)


def show_published(projected: pd.DataFrame, profile: Profile) -> None:
    """Print one row per published result, and what is assumed; the published speedup is another machine's."""
    title = f"Projection of published accept lengths, not measured: {profile.shape}, {profile.dtype}, after "
    title += f"{projected['context'].iloc[0]} rows, on {profile.device} ({profile.path})"
    cells = [
        {
            "system": row.name,
            "backbone": row.backbone,
            "accept length": format_number(row.accept_length),
            "rows": str(row.rows),
            "draft MB": f"{row.draft_mb:.0f}",
            "draft ms": format_number(row.draft_ms),
            "verify ms": format_number(row.verify_ms),
            "projected speedup": format_number(row.speedup) if pd.isna(row.refused) else row.refused,
            "published speedup, elsewhere": format_number(row.published_speedup),
            "source": row.source,
        }
        for row in projected.itertuples(index=False)
    ]
    show_table(title, pd.DataFrame(cells), ["system", "backbone", "source"])
    print(PUBLISHED_ASSUMED)
