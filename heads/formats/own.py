"""The formats of this project: a checkpoint, and single files with the same content."""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path

import numpy as np

import runtime
from backbone.files.layout import PICKLE_FILE, container
from backbone.formats.cast import FLOATS
from backbone.formats.containers import write_pickle
from heads.checkpoint import CONFIG, PROVENANCE, WEIGHTS, check_config, check_files, read_config, save_checkpoint
from heads.formats.base import Format
from heads.formats.contents import FLOAT32, Casting, HeadWeights, Target, expect, widen
from heads.formats.files import CALIBRATION, Found, check_file, check_folder, is_npz
from heads.formats.inputs import Inputs
from heads.registry import build, make_config
from runtime.atomic import atomic_file, sha256_of
from runtime.files.documents import parse_json, to_json

TEXTS = (PROVENANCE, CALIBRATION)
KEYS = {"head", "head_config", "backbone"}  # of every config.json of ours


class OwnFormat(Format):
    """A format with our names."""

    def logits(self, found: Found, target: Target, inputs: Inputs) -> list[np.ndarray]:
        return head_logits(filled_head(self.read(found, target), target.exact_model), inputs)


class Checkpoint(OwnFormat):
    """The folder of a checkpoint, see docs/DESIGN.md."""

    name, sentence = "gorgon", "a checkpoint of this project: head.safetensors and config.json"

    def recognize(self, found: Found) -> bool:
        return found.file.name == WEIGHTS and found.config.keys() >= KEYS

    def read(self, found: Found, target: Target) -> HeadWeights:
        folder = found.file.parent
        config = read_config(folder)
        check_files(folder, config.get("files", {}))
        texts = {name: (folder / name).read_text("utf-8") for name in TEXTS if (folder / name).is_file()}
        return HeadWeights(config["head"], config["head_config"], found.tensors, config, texts, found.notes)

    def check_out(self, out: Path, overwrite: bool) -> Path:
        check_folder(out, overwrite)
        return out

    def write(self, weights: HeadWeights, out: Path, casting: Casting, target: Target) -> None:
        """The head is built on its backbone first, so that what is written can be loaded.

        Raises ValueError for a dtype other than float32, another backbone and parameters that do not fit.
        """
        if casting.dtype != FLOAT32:
            raise ValueError(f"a checkpoint holds float32, got --dtype {casting.dtype}; leave it out")
        target.check_belongs(weights)
        config, texts = completed(weights, target)
        provenance = parse_json(texts.pop(PROVENANCE), PROVENANCE)
        save_checkpoint(out, filled_head(weights, target.model), config, provenance)
        for name, text in texts.items():
            (out / name).write_text(text, "utf-8")


class Container(OwnFormat):
    """One file with the parameters as arrays and the checkpoint's JSON files as text entries."""

    def recognize(self, found: Found) -> bool:
        return self.holds(found.file) and CONFIG in found.texts

    @abc.abstractmethod
    def holds(self, file: Path) -> bool:
        """Whether a file is this container."""

    def read(self, found: Found, target: Target) -> HeadWeights:
        where = f"{found.file}: its entry {CONFIG}"
        if CONFIG not in found.texts:
            raise ValueError(f"{where} is missing, so the head is unknown; write the file with --to {self.name}")
        config = parse_json(found.texts[CONFIG], where)
        check_config(config, where)
        integers = {name for name, tensor in found.tensors.items() if tensor.dtype == np.int32}  # buffers: token ids
        for name, tensor in found.tensors.items():
            if name not in integers and tensor.dtype not in FLOATS.values():
                raise ValueError(f"{found.file}: {name} is {tensor.dtype}; expected one of {', '.join(FLOATS)}")
        rounded = sorted({str(tensor.dtype) for tensor in found.tensors.values()} - {"float32", "int32"})
        if rounded:
            config = {**config, "imported": {"format": self.name, "stored_as": rounded}}
        tensors = {name: each if name in integers else widen(name, each) for name, each in found.tensors.items()}
        texts = {name: found.texts[name] for name in TEXTS if name in found.texts}
        return HeadWeights(config["head"], config["head_config"], tensors, config, texts, found.notes)

    def check_out(self, out: Path, overwrite: bool) -> Path:
        check_file(out, overwrite)
        return out

    def entries(self, weights: HeadWeights, target: Target) -> dict[str, str]:
        """The text entries."""
        config, texts = completed(weights, target)
        return {CONFIG: to_json(config, 2) + "\n", **texts}


class JittorPickle(Container):
    name, sentence = "jittor-pkl", "one .pkl or .jtr file, as jittor.save writes it, with the config inside"

    def holds(self, file: Path) -> bool:
        return container(file) == PICKLE_FILE

    def write(self, weights: HeadWeights, out: Path, casting: Casting, target: Target) -> None:
        tensors, entries = casting.apply(weights.tensors), self.entries(weights, target)
        with atomic_file(out) as path:
            write_pickle(path, tensors, entries)


class Npz(Container):
    name, sentence = "npz", "one NumPy .npz file with the config inside"

    def holds(self, file: Path) -> bool:
        return is_npz(file)

    def write(self, weights: HeadWeights, out: Path, casting: Casting, target: Target) -> None:
        if casting.dtype == FLOATS["bfloat16"]:
            raise ValueError("NumPy has no bfloat16; choose --dtype float32, which holds the same numbers")
        arrays = {name: tensor.read() for name, tensor in casting.apply(weights.tensors).items()}
        arrays |= {name: np.array(text) for name, text in self.entries(weights, target).items()}
        with atomic_file(out) as path, open(path, "wb") as file:
            np.savez(file, **arrays)


def completed(weights: HeadWeights, target: Target) -> tuple[dict, dict[str, str]]:
    """The config.json of a head's checkpoint and its other JSON files. An imported head is assigned to the backbone;
    nothing is known about its training, so ``metrics`` is empty.

    Raises ValueError for parameters that do not fit.
    """
    config, texts = weights.config, dict(weights.texts)
    texts.setdefault(PROVENANCE, to_json(runtime.provenance(), 2) + "\n")
    if config.keys() >= KEYS:
        return config, texts
    head, c = filled_head(weights, target.model), target.config
    backbone = {
        "fingerprint": target.model.fingerprint,
        "path": target.path,
        "hidden_size": c.hidden_size,
        "vocab_size": c.vocab_size,
        "dtype": target.model.storage,
    }
    return {
        "head": weights.head,
        "head_config": dataclasses.asdict(head.config),
        "backbone": backbone,
        "tokenizer": {"fingerprint": target.tokenizer_fingerprint(), "template": None},
        "num_parameters": head.num_parameters,
        "metrics": {},
        **config,
    }, texts


def imported_from(name: str, found: Found, notes: list[str]) -> dict:
    """The part of config.json that names the source of a head."""
    files = {found.file.name: sha256_of(found.file)}
    return {"imported": {"format": name, "files": files, "config": found.config, "notes": notes}}


def default_options(head: str, **known) -> dict:
    """All options of a head: the known ones, and defaults for the others."""
    return dataclasses.asdict(make_config(head, known))


def filled_head(weights: HeadWeights, backbone):
    """The head on this backbone, ready to draft. Raises ValueError naming every parameter that does not fit."""
    head = build(weights.head, weights.options, backbone)
    own = dict(head.named_parameters())
    integers = [name for name, p in own.items() if str(p.dtype) == "int32"]  # token ids of a draft vocabulary
    expect(f"the head {weights.head}", weights.tensors, {name: tuple(p.shape) for name, p in own.items()}, integers)
    for name, parameter in own.items():
        tensor = weights.tensors[name]
        parameter.update((tensor if name in integers else widen(name, tensor)).read())
    head.eval()
    return head


def head_logits(head, inputs: Inputs) -> list[np.ndarray]:
    """A head's logits at every position of the inputs: one (rows, vocab) float32 per depth."""
    from heads.base import Features
    from runtime import jt

    drawn = inputs.of(head.dim, head.vocab_size, head.num_depths, head.layers)
    layers = {index: jt.array(hidden[None]) for index, hidden in drawn.layers.items()}
    features = Features(jt.array(drawn.hidden[None]), layers)
    output = head(features, drawn.token_ids[None], np.arange(len(drawn.hidden)))
    return [each.value().numpy() if hasattr(each, "value") else each.numpy() for each in output.logits]
