"""The prompts of a measurement: those of ``trainer.data.prompts``, with unique ids, sampled evenly over categories."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.data.parquet import is_table, table_files
from trainer.data.prompts import Prompt, read_prompts


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, and what was left out of it.

    dropped: reason -> number left out, as in ``trainer.data.prompts.PromptFile``. sha256: of the file's bytes, before
    unzipping; of a table, of its files' in order. notes: on unusable records, one line a file.
    """

    prompts: tuple[Prompt, ...]
    dropped: dict[str, int]
    source: str
    sha256: str
    notes: tuple[str, ...] = ()


def load_prompts(path: str | Path, num_prompts: int | None = None, seed: int = 0) -> PromptSet:
    """Read a prompt file; see ``trainer.data.prompts.read_prompts``. Ids are unique within the set: the second record
    with an id gets ``#2``. With ``num_prompts`` the sample is spread over the categories (see ``spread``); a file with
    fewer prompts gives them all.
    """
    found = read_prompts(path)
    unique = _unique_ids(found.prompts)
    if num_prompts is not None:
        unique = spread(unique, num_prompts, seed)
    files = table_files(path) if is_table(path) else [Path(path)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    reasons = found.left_out.describe()
    notes = (f"{path}: left out {reasons}",) if reasons else ()
    return PromptSet(tuple(unique), found.dropped(), str(path), digest.hexdigest(), notes)


def join_prompt_sets(sets: Sequence[PromptSet]) -> PromptSet:
    """Several sets as one: ids made unique again, dropped counts summed, sha256 of the sets' hashes in order."""
    dropped: Counter[str] = Counter()
    for one in sets:
        dropped.update(one.dropped)
    digest = hashlib.sha256("".join(one.sha256 for one in sets).encode()).hexdigest()
    prompts = _unique_ids(prompt for one in sets for prompt in one.prompts)
    notes = tuple(note for one in sets for note in one.notes)
    return PromptSet(tuple(prompts), dict(dropped), " + ".join(one.source for one in sets), digest, notes)


def spread(prompts: Sequence[Prompt], num_prompts: int, seed: int = 0) -> list[Prompt]:
    """``num_prompts`` prompts, or all if there are fewer, taken round robin over the categories.

    Categories come in the order of their first appearance. seed 0 keeps the file's order within a category; another
    seed shuffles within it. A smaller sample is the beginning of a larger one.

    Example: categories a a a b, four asked for: a1 b1 a2 a3.
    """
    queues: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        queues.setdefault(prompt.category, []).append(prompt)
    if seed:
        for category, queue in queues.items():
            random.Random(f"{seed}:{category}").shuffle(queue)
    longest = max((len(queue) for queue in queues.values()), default=0)
    rounds = (queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue))
    return [prompt for _, prompt in zip(range(num_prompts), rounds, strict=False)]


def _unique_ids(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The same prompts; a repeated id gets the first free of ``#2``, ``#3``, ..."""
    prompts = list(prompts)
    taken = {prompt.prompt_id for prompt in prompts}
    seen: dict[str, int] = {}
    result = []
    for prompt in prompts:
        name, count = prompt.prompt_id, seen.get(prompt.prompt_id, 0) + 1
        if count > 1:
            while f"{name}#{count}" in taken:
                count += 1
            prompt = replace(prompt, prompt_id=f"{name}#{count}")
            taken.add(prompt.prompt_id)
        seen[name] = count
        result.append(prompt)
    return result
