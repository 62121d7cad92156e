"""How tensors are laid out over several files, as Hugging Face does it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from backbone.files.lazy import LazyTensor

UNITS = {"": 1, "B": 1, **{f"{unit}B": 1000**power for power, unit in enumerate("KMG", 1)}}
UNITS |= {f"{unit}iB": 1024**power for power, unit in enumerate("KMG", 1)}


def parse_size(text: str) -> int:
    """Bytes in a size such as 2GB, 500MB or 1.5GiB. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    size = int(float(match[1]) * units[match[2].lower()]) if match and match[2].lower() in units else 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size; expected something like 2GB, 500MB or 1.5GiB")
    return size


def plan_shards(tensors: Mapping[str, LazyTensor], single: str, shard_size: int) -> dict[str, list[str]]:
    """File name -> names of the tensors in it, in order; a tensor above ``shard_size`` bytes has a file of its own.

    >>> plan_shards({"a": two_bytes, "b": two_bytes, "c": two_bytes}, "model.bin", 4)
    {"model-00001-of-00002.bin": ["a", "b"], "model-00002-of-00002.bin": ["c"]}
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {single: groups[0]}
    stem, suffix = single.rsplit(".", 1)
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.{suffix}": group for i, group in enumerate(groups, 1)}
