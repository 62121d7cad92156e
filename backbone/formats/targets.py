"""What each format looks like on disk: fills an empty folder (or one file) with a backbone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.config import CONFIG, GENERATION_CONFIG, BackboneConfig
from backbone.files import meta
from backbone.files.layout import BIN, META, META_PARAMS, PICKLE, PICKLE_NAME, SAFETENSORS, SINGLE
from backbone.files.lazy import LazyTensor
from backbone.formats.containers import write_pickle, write_safetensors, write_torch
from backbone.formats.shards import plan_shards
from backbone.formats.source import FILES_ENTRY, Source
from runtime.files.documents import to_json, write_json


@dataclass(frozen=True)
class Job:
    """What to write: the backbone, its tensors in the target type, the content of its config.json."""

    source: Source
    tensors: dict[str, LazyTensor]
    config: dict[str, Any]
    shard_size: int
    note: Callable[[str], None]


def _write_config_and_files(job: Job, folder: Path) -> None:
    write_json(folder / CONFIG, job.config)
    if job.source.raw.generation is not None:
        write_json(folder / GENERATION_CONFIG, job.source.raw.generation)
    for name, content in job.source.files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


def _write_hugging_face(
    job: Job, folder: Path, layout: str, write: Callable[[Path, dict[str, LazyTensor]], None]
) -> None:
    single = SINGLE[layout]
    plan = plan_shards(job.tensors, single, job.shard_size)
    for file, names in plan.items():
        job.note(f"writing {file}: {len(names)} tensors")
        write(folder / file, {name: job.tensors[name] for name in names})
    if len(plan) > 1:
        size = sum(tensor.nbytes for tensor in job.tensors.values())
        weight_map = {name: file for file, names in plan.items() for name in names}
        write_json(folder / f"{single}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    _write_config_and_files(job, folder)


def write_safetensors_folder(job: Job, folder: Path) -> None:
    """config.json with model.safetensors, or with shards and an index."""
    _write_hugging_face(job, folder, SAFETENSORS, write_safetensors)


def write_bin_folder(job: Job, folder: Path) -> None:
    """config.json with pytorch_model.bin, or with shards and an index."""
    _write_hugging_face(job, folder, BIN, write_torch)


# Meta ----------------------------------------------------------------------------------------------------------------


def params_of(config: BackboneConfig) -> dict[str, Any]:
    """params.json for a backbone. Raises ValueError for what it has no field for.

    Every llama3 scaling is written as use_scaled_rope, the only field that Meta's own checkpoints have for it.
    """
    if config.num_heads * config.head_dim != config.hidden_size:
        raise ValueError(
            f"head_dim {config.head_dim} times {config.num_heads} heads is not hidden_size {config.hidden_size}; "
            f"{META_PARAMS} has no field for that: choose another format"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] != "llama3":
        raise ValueError(f"{META_PARAMS} has no field for rope scaling {to_json(scaling)}; choose another format")
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        **_feed_forward_fields(config.hidden_size, config.intermediate_size),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
    }
    return params | ({"use_scaled_rope": True} if scaling else {})


def _feed_forward_fields(dim: int, wide: int) -> dict[str, Any]:
    """multiple_of and ffn_dim_multiplier that give ``wide``: the published ones first, then a pair that always does."""
    for multiple_of, multiplier in ((256, None), (1024, 1.3), (256, 1.5), (4096, 1.3)):
        if meta.feed_forward_size(dim, multiple_of, multiplier) == wide:
            return {"multiple_of": multiple_of} | ({"ffn_dim_multiplier": multiplier} if multiplier else {})
    size = meta.feed_forward_size(dim, 1, None)
    return {"multiple_of": wide} | ({"ffn_dim_multiplier": wide / size} if size > wide else {})


def _meta_tensors(job: Job) -> dict[str, LazyTensor]:
    """The tensors under Meta's names, wq and wk in its row order."""
    config, found = job.source.config, {}
    for name, ours in meta.TOP.items():
        if ours in job.tensors:
            found[name] = job.tensors[ours]
    for index in range(config.num_layers):
        for part, ours in (meta.ROWS | meta.COLUMNS | meta.WHOLE).items():
            tensor = job.tensors[f"model.{meta.layer_name(index, ours)}"]
            rotated = part in meta.ROTATED
            found[meta.layer_name(index, part)] = meta.to_interleaved(tensor, config.head_dim) if rotated else tensor
    return found


def write_meta_folder(job: Job, folder: Path) -> None:
    """params.json and one consolidated.00.pth. config.json is added for what params.json has no field for.

    Tied embeddings are written once under two names, because Meta's own code reads output.weight.
    """
    config = job.source.config
    params = params_of(config)
    if config.rope_scaling is not None and any(
        not math.isclose(config.rope_scaling[key], value)
        for key, value in meta.SCALED_ROPE.items()
        if key != "rope_type"
    ):
        job.note(f"{META_PARAMS} has no field for rope scaling {to_json(config.rope_scaling)}; {CONFIG} has it")
    tensors, shared = _meta_tensors(job), {}
    if config.tie_embeddings:
        tensors[meta.OUTPUT], shared = tensors[meta.EMBEDDING], {meta.OUTPUT: meta.EMBEDDING}
    file = folder / "consolidated.00.pth"
    job.note(f"writing {file.name}: {len(tensors)} tensors")
    write_torch(file, tensors, shared)
    write_json(folder / META_PARAMS, params)
    _write_config_and_files(job, folder)


# jittor --------------------------------------------------------------------------------------------------------------


def write_pickle_file(job: Job, path: Path, files: bool = True) -> None:
    """One ``.pkl``: config, generation_config, the tokenizer's files as bytes, then the arrays."""
    job.note(f"writing {len(job.tensors)} tensors into one .pkl")
    entries: dict[str, Any] = {"config": job.config}
    if job.source.raw.generation is not None:
        entries["generation_config"] = job.source.raw.generation
    if files and job.source.files:
        contents = job.source.files.items()
        entries[FILES_ENTRY] = {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in contents}
    write_pickle(path, job.tensors, entries)


def write_pickle_folder(job: Job, folder: Path) -> None:
    """backbone.pkl, with the tokenizer's files and config.json."""
    write_pickle_file(job, folder / PICKLE_NAME, files=False)
    _write_config_and_files(job, folder)


FOLDERS: dict[str, Callable[[Job, Path], None]] = {
    SAFETENSORS: write_safetensors_folder,
    BIN: write_bin_folder,
    META: write_meta_folder,
    PICKLE: write_pickle_folder,
}
