"""Heads over several training seeds: what a head accepts, and how much of it was luck.

Results of one head with one set of options form a group, told apart by the seed their checkpoint was trained with. The
accept length of a head is the mean over its seeds, with an interval over seeds and prompts
(``bench.record.metrics.over_seeds``). The ratio to the reference is the mean of the ratios by seed, prompts paired by
id. All figures are of the prompts that count in every result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.record.metrics import comparable_rows, over_seeds
from bench.record.schema import PromptRow
from bench.tables.results import Result, differences, results_frame, unequal_conditions
from runtime.entry import suggest
from runtime.files.documents import parse_json, to_json

SAME_TRAINING = 1.02  # training differs if steps or tokens do by more: seeds pack batches differently


@dataclass(frozen=True)
class Group:
    """The results of one head with one set of options, by seed. label: the head's name, with the options in which it
    differs from other groups of that head. runs: rows of ``load_results``."""

    label: str
    head: str
    runs: pd.DataFrame

    @property
    def trained(self) -> bool:
        """Whether there is anything that a seed could change."""
        return bool((self.runs["parameters"] > 0).any())


def group_runs(heads: Sequence[Result]) -> list[Group]:
    """The groups, in order of appearance.

    Raises ValueError if results differ in what decides accept length (prompts, backbone, dtype, tree budget, ...), and
    for runs of a head that share a seed or do not record it.
    """
    frame = results_frame(heads)
    refused = [text for condition, text in unequal_conditions(frame).items() if condition.same_work]
    if refused:
        raise ValueError(f"these results cannot be put together: {'; '.join(refused)}")
    groups = []
    for head, same_head in frame.groupby("head", sort=False):
        labels = _labels(head, same_head["head_options"].unique())
        for options, runs in same_head.groupby("head_options", sort=False):
            _check_seeds(head, runs)
            groups.append(Group(labels[options], head, runs.sort_values("seed", kind="stable")))
    return groups


def _labels(head: str, variants: Sequence[str]) -> dict[str, str]:
    """A label per set of options, given as JSON: the head's name, and the options that are not the same in all."""
    if len(variants) == 1:
        return {variants[0]: head}
    options = pd.DataFrame([parse_json(each, "head_options") for each in variants], dtype=object)
    text = options.map(to_json).where(options.notna(), "unset")
    unequal = [name for name in options if text[name].nunique() > 1]
    shown = options.astype(object).where(options.notna(), "unset")[unequal]
    rows = [", ".join(f"{name}={value}" for name, value in row.items()) for row in shown.to_dict("records")]
    return {variant: f"{head} ({row})" for variant, row in zip(variants, rows, strict=True)}


def _check_seeds(head: str, runs: pd.DataFrame) -> None:
    if len(runs) > 1 and runs["seed"].isna().any():
        path = runs.loc[runs["seed"].isna(), "path"].iloc[0]
        raise ValueError(
            f"{path}: does not record its training seed, and there are {len(runs)} results of {head}; measure its "
            "checkpoint again with bench/run.py"
        )
    repeated = runs[runs["seed"].duplicated(keep=False) & runs["seed"].notna()]
    for seed, same in repeated.groupby("seed"):
        raise ValueError(f"{len(same)} results of {head} have training seed {seed}: {', '.join(same['path'])}")


def find_group(groups: Sequence[Group], name: str) -> Group:
    """The group with this label or head. Raises ValueError if there is none or several."""
    found = [group for group in groups if group.label == name] or [group for group in groups if group.head == name]
    if len(found) > 1:
        raise ValueError(f"{name!r} names {len(found)} heads: {', '.join(repr(group.label) for group in found)}")
    if not found:
        raise suggest("head", name, [group.label for group in groups])
    return found[0]


def shared_rows(heads: Sequence[Result]) -> dict[str, list[PromptRow]]:
    """Path -> its rows of the prompts that count in every result, in one order. Raises ValueError if there is none."""
    by_path = {each.path: {row.prompt_id: row for row in comparable_rows(each.record.per_prompt)} for each in heads}
    shared = [name for name in by_path[heads[0].path] if all(name in rows for rows in by_path.values())]
    if not shared:
        raise ValueError(f"no prompt counts in each of {', '.join(by_path)}")
    return {path: [rows[name] for name in shared] for path, rows in by_path.items()}


def summarize_groups(
    groups: Sequence[Group], rows: dict[str, list[PromptRow]], reference: Group | None
) -> list[dict[str, Any]]:
    """A line per group, the largest accept length first. rows: of ``shared_rows``.

    None is unknown. seeds: of the runs, in the order of accept_length's by_run; categories: the accept length by
    category; ratio: to the reference, None for the reference itself and if no run has a partner; parameters, train_s,
    draft_ms: means over the runs; warnings: what makes this line less comparable.
    """
    first = rows[groups[0].runs["path"].iloc[0]]  # names the category of each prompt
    places = pd.Series([row.category for row in first]).groupby([row.category for row in first], sort=False).indices
    lines = [_line(group, reference, reference or groups[0], rows, places) for group in groups]
    return sorted(lines, key=lambda line: -(line["accept_length"]["value"] or 0))


def _line(
    group: Group, reference: Group | None, norm: Group, rows: dict[str, list[PromptRow]], places: dict
) -> dict[str, Any]:
    """norm: whose training is the usual one. places: of each category in the order of the rows."""
    runs = [rows[path] for path in group.runs["path"]]
    warnings = training_warnings(group, norm)
    if group.trained and len(runs) == 1:
        warnings.append("one seed: interval over prompts alone")
    ratio = None
    if reference is not None and group is not reference:
        pairs = partners(group, reference)
        if len(pairs):
            ratio = _estimate(*([rows[path] for path in pairs[side]] for side in ("path", "path_reference")))
        if group.trained and len(pairs) < len(runs):
            warnings.append(f"{len(pairs)} of {len(runs)} seeds are also {reference.label}'s")
    means = group.runs[["parameters", "train_s", "draft_ms"]].astype(float).mean(skipna=False)
    return {
        "label": group.label,
        "seeds": [None if pd.isna(seed) else int(seed) for seed in group.runs["seed"]],
        "accept_length": _estimate(runs),
        "categories": {
            name: _estimate([[run[place] for place in chosen] for run in runs]) for name, chosen in places.items()
        },
        "ratio": ratio,
        **{name: None if pd.isna(value) else value for name, value in means.items()},
        "warnings": warnings,
    }


def _estimate(runs: Sequence[list[PromptRow]], others: Sequence[list[PromptRow]] | None = None) -> dict[str, Any]:
    """The accept length over the runs, or its ratio to that of the others, as JSON holds it."""
    return dataclasses.asdict(over_seeds(runs, "accept_length", others))


def partners(group: Group, reference: Group) -> pd.DataFrame:
    """Which runs are compared: the columns path and path_reference, and seed where that pairs them.

    Runs of the same seed. A head without anything to train is the partner of every run of the other one; two heads of
    one run each are compared whatever their seeds, as their interval is over prompts alone anyway.
    """
    mine, theirs = group.runs[["path", "seed"]], reference.runs[["path", "seed"]]
    if group.trained and reference.trained and not len(mine) == len(theirs) == 1:
        return mine.merge(theirs, on="seed", suffixes=("", "_reference"))
    if not reference.trained:
        mine, theirs = (mine if group.trained else mine[:1]), theirs[:1]
    elif not group.trained:
        mine = mine[:1]
    return mine.merge(theirs, how="cross", suffixes=("", "_reference"))


def training_warnings(group: Group, norm: Group) -> list[str]:
    """How the training of a group's runs differs from that of ``norm``, in steps and tokens."""
    if not group.trained or not norm.trained:
        return []
    found = []
    for name, unit in (("train_steps", "steps"), ("train_tokens", "tokens")):
        mine, theirs = group.runs[name], norm.runs[name]
        both = pd.concat([mine, theirs])
        if both.isna().any():
            if both.nunique(dropna=False) > 1:
                found.append(f"{unit} unknown")
        elif both.max() > SAME_TRAINING * both.min():
            against = "" if group is norm else f", {norm.label} {_span(theirs)}"
            found.append(f"{unit} {_span(mine)}{against}")
    return found


def _span(numbers: pd.Series) -> str:
    low, high = numbers.min(), numbers.max()
    return str(low) if low == high else f"{low} to {high}"


def doubts(heads: Sequence[Result], num_prompts: int) -> list[str]:
    """What is doubtful about the results or unequal among them, one sentence each. num_prompts: that count in all."""
    frame = results_frame(heads)
    sentences, asked = differences(frame), frame["num_prompts"].max()
    if num_prompts < asked:
        sentences.append(f"{num_prompts} of {asked} prompts count in every result; all figures are of these")
    for row in frame.itertuples():
        if row.parity_failed:
            sentences.append(f"parity failed ({row.parity} identical): {row.path}")
        if row.interrupted:
            sentences.append(f"interrupted after {row.prompts} prompts: {row.path}")
        if row.adapted:
            sentences.append(f"it changes the backbone, its accept length is of another text: {row.path}")
    return sentences
