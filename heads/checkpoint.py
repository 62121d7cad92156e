"""Trained heads on disk: safetensors and JSON, written atomically, read strictly.

A checkpoint is a directory with ``head.safetensors`` (parameters by name, float32), ``config.json`` (head, options,
backbone, tokenizer, data, metrics) and ``provenance.json``. Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from backbone.files.lazy import check_finite
from heads.registry import build
from runtime.atomic import atomic_directory, naming, sha256_of
from runtime.files.documents import identity, plain, read_object, write_json
from runtime.files.regular import open_regular
from runtime.files.shown import MOST, shown

WEIGHTS, CONFIG, PROVENANCE = "head.safetensors", "config.json", "provenance.json"


def save_checkpoint(directory: Path, head, config: dict, provenance: dict) -> None:
    """Write a checkpoint atomically: a reader sees the old one or the new one, never a part.

    config: JSON-ready; see docs/DESIGN.md for its keys. Raises OSError where the directory cannot be written.
    """
    with naming(directory), atomic_directory(directory) as partial:
        save_parameters(head, partial / WEIGHTS)
        files = {WEIGHTS: sha256_of(partial / WEIGHTS)}
        write_json(partial / CONFIG, signed({**config, "files": files}))
        write_json(partial / PROVENANCE, provenance)


def save_parameters(head, path: Path) -> None:
    """All parameters and buffers of a head as safetensors."""
    save_arrays({name: np.ascontiguousarray(p.numpy()) for name, p in head.named_parameters()}, path)


def save_arrays(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Arrays by name as safetensors. Raises OSError where they cannot be written, as on a full disk."""
    try:
        save_file(arrays, str(path))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def config_digest(config: dict) -> str:
    """Hash of a config.json's content without its ``digest``."""
    content = {key: value for key, value in config.items() if key != "digest"}
    return hashlib.sha256(identity(content, sort_keys=True).encode()).hexdigest()


def signed(config: dict) -> dict:
    """The content with its ``digest``, as it will be read again: integer keys, tuples and NaN change."""
    config = plain(config)
    return {**config, "digest": config_digest(config)}


def find_checkpoint(directory) -> Path:
    """The checkpoint in a directory: itself, or its ``checkpoint/`` folder. Raises ValueError when there is none."""
    directory = Path(directory)
    for candidate in (directory, directory / "checkpoint"):
        if (candidate / CONFIG).is_file():
            return candidate
    raise ValueError(f"no checkpoint in {directory}: expected {CONFIG} and {WEIGHTS} there or in checkpoint/")


def latest_checkpoints(runs: Path) -> dict[str, Path]:
    """The newest checkpoint of each head under ``runs/<head>/<run>/checkpoint``, by head."""
    newest: dict[str, tuple[float, Path]] = {}
    for config in sorted(Path(runs).glob(f"*/*/checkpoint/{CONFIG}")):
        name, when = config.parents[2].name, config.stat().st_mtime
        if name not in newest or when > newest[name][0]:
            newest[name] = (when, config.parent)
    return {name: path for name, (_, path) in sorted(newest.items())}


def read_config(directory: Path) -> dict:
    """The config.json of a checkpoint. Raises ValueError naming the file when it is not one of ours."""
    path = Path(directory) / CONFIG
    config = read_object(path)
    check_config(config, str(path))
    if "digest" in config and config["digest"] != config_digest(config):
        raise ValueError(f"{path} was changed after it was written: its digest does not match")
    return plain(config)  # older ones hold NaN


def check_config(config: object, where: str) -> None:
    """Raises ValueError for what is not the content of the config.json of a head's checkpoint."""
    kinds = {"head": str, "head_config": dict, "backbone": dict, "files": dict, "metrics": dict}
    config = {"files": {}, "metrics": {}, **config} if isinstance(config, dict) else {}
    wrong = [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]
    if wrong:
        raise ValueError(f"{where} is not that of a head: {', '.join(wrong)} missing or of the wrong type")
    check_hashes(config["files"], where)


def check_hashes(files: dict, where: str) -> None:
    """Raises ValueError for what is not a hash by the name of a file in the same folder."""
    for name, digest in files.items():
        if name != Path(name).name or not isinstance(digest, str):
            raise ValueError(f"{where}: files holds {shown({name: digest})}, expected sha256 by the name of a file")


def update_config(directory: Path, changes: dict) -> None:
    """Set some keys of a checkpoint's config.json, all or none of them."""
    write_json(Path(directory) / CONFIG, signed({**read_config(directory), **changes}))


def load_head(directory, backbone):
    """The head of a checkpoint on this backbone, ready to draft, and its config.json.

    Raises ValueError for a checkpoint trained on another backbone, for a damaged file, and for parameters that are
    missing, unexpected, of another shape or not finite, each named.
    """
    directory = find_checkpoint(directory)
    config = read_config(directory)
    trained_on = config["backbone"]
    if trained_on.get("fingerprint") != backbone.fingerprint:
        raise ValueError(
            f"{directory} was trained on backbone {_named(trained_on)}, "
            f"this is {backbone.fingerprint} ({backbone.path or 'embedded'}); pass --backbone with the right one"
        )
    head = build(config["head"], config["head_config"], backbone)
    load_parameters(head, directory / WEIGHTS)  # before the hashes: it names what does not fit
    check_files(directory, config.get("files", {}))
    head.eval()
    return head, config


def _named(backbone: dict) -> str:
    """Fingerprint and path of the backbone of a checkpoint."""
    return " ".join(str(backbone.get(key))[:MOST] for key in ("fingerprint", "path"))


def check_files(directory: Path, hashes: dict[str, str]) -> None:
    """Raises ValueError naming a file that is missing or whose hash differs. hashes: sha256 by file name."""
    for name, expected in hashes.items():
        path = Path(directory) / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        found = sha256_of(path)
        if found != expected:
            raise ValueError(f"{path} is damaged: its sha256 is {found[:16]}..., expected {expected[:16]}...")


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """What ``save_arrays`` wrote. Raises ValueError naming a file that is something else."""
    try:
        open_regular(path).close()
        return load_file(str(path))
    except (OSError, SafetensorError, KeyError, TypeError) as error:  # the last two for types that NumPy does not have
        raise ValueError(f"{path} cannot be read: {error}") from error


def load_parameters(head, path: Path) -> None:
    """Fill a head from a safetensors file. Raises ValueError naming every parameter that does not fit, and one that is
    not finite."""
    tensors = load_arrays(path)
    own = dict(head.named_parameters())
    problems = [f"missing {name}" for name in sorted(set(own) - set(tensors))]
    problems += [f"unexpected {name}" for name in sorted(set(tensors) - set(own))]
    for name in sorted(set(own) & set(tensors)):
        if tuple(own[name].shape) != tensors[name].shape:
            problems.append(f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}")
        elif tensors[name].dtype != own[name].dtype:
            problems.append(f"{name} is {tensors[name].dtype}, expected {own[name].dtype}")
    if problems:
        raise ValueError(f"{path} does not fit head {type(head).__name__}: {'; '.join(problems[:10])}")
    for name in own:
        check_finite(f"{path}: {name}", tensors[name])
    for name, parameter in own.items():
        parameter.update(tensors[name])
    head.forget_packed()


def weights_sha256(directory: Path) -> str:
    """Hash of the head's weights, as hexadecimal digits."""
    return sha256_of(Path(directory) / WEIGHTS)
