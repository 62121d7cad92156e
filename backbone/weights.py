"""Reads backbone weights from disk, one tensor at a time, and reports exactly what is wrong with them.

Files from outside are data, never code. ``*.safetensors`` is data by design; pickles are read by unpicklers that know
only tensors. Names are Hugging Face's in every layout: a Meta directory is renamed and assembled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from backbone.config import BackboneConfig
from backbone.files.layout import (
    BIN,
    META,
    META_PARAMS,
    PICKLE,
    PICKLE_FILE,
    PICKLE_NAME,
    SAFETENSORS,
    SAFETENSORS_FILE,
    SINGLE,
    TORCH_FILE,
    container,
    layouts,
    loose_files,
)
from backbone.files.lazy import LazyTensor, Refused, Shape, damaged, stored
from backbone.files.meta import open_meta
from backbone.files.pickle_file import open_pickle_file
from backbone.files.torch_file import open_torch_file
from runtime.files.documents import identity, parse_json, read_object
from runtime.files.shown import MOST, shown

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# Old conversions store the rotary frequencies as buffers; they follow from the config.
ROTARY_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|bin)$")
NAMES_LISTED = 10
MOST_NAME = 256  # bytes of a file's name, and its end
SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


# Files ---------------------------------------------------------------------------------------------------------------


def open_safetensors_file(path: str | Path) -> dict[str, LazyTensor]:
    """Tensors of one ``*.safetensors`` file, in file order. Raises ValueError naming the file when it is damaged.

    The library checks the file; the header is read again here because the library keeps mapped numbers in memory as
    long as the file is open, and drops a repeated name.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy"), open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            text = file.read(length).decode()
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise damaged(path, error) from error
    header = parse_json(text, path, each_once=True)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            reason = f"tensor {name[:MOST]} has type {entry['dtype']}, which has no NumPy equivalent"
            raise damaged(path, Refused(reason))
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        tensors[name] = stored(path, dtype, shape, 8 + length + entry["data_offsets"][0])
    return tensors


def open_file(path: str | Path) -> dict[str, LazyTensor]:
    """Tensors of one file: safetensors, ``torch.save``'s or a pickled dict of arrays, told apart by its first bytes.

    Only headers are read. Raises ValueError naming the file when it is none of these, damaged or hostile.
    """
    path = Path(path)
    try:
        found = container(path)
    except OSError as error:
        raise damaged(path, error) from error
    if found == TORCH_FILE:
        return open_torch_file(path)
    if found == PICKLE_FILE:
        return open_pickle_file(path)[0]
    if found == SAFETENSORS_FILE or path.suffix == ".safetensors":  # the library explains what is damaged
        return open_safetensors_file(path)
    raise damaged(path, ValueError("it is neither safetensors nor torch.save's format nor a pickle"))


# Directories ---------------------------------------------------------------------------------------------------------


def _check_inside(index: Path, name: str, shard: object) -> None:
    """Raises ValueError when an index names a file outside its folder, by path or through a link."""
    outside = f"{index} places {name[:MOST]} in {shown(shard)}, outside its own folder; expected "
    bare = isinstance(shard, str) and shard.isprintable() and len(shard.encode()) < MOST_NAME
    if not bare or "\\" in shard or PurePosixPath(shard).name != shard or shard in ("", ".."):
        raise ValueError(f"{outside}a bare file name")
    folder, target = index.parent.resolve(), (index.parent / shard).resolve()
    # Hugging Face's download cache: snapshots/<revision>/ links to blobs/ of the same model.
    cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if target.parent not in (folder, cache):
        raise ValueError(f"{outside}a file, not a link to {target}; copy it here or pass its folder")


def _files_of_index(index: Path) -> dict[Path, set[str]]:
    """The shards that an index names, and the tensors it places in each."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, expected an object of tensor name to file name")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or index.parent / shard not in shards:
            _check_inside(index, name, shard)
        shards.setdefault(index.parent / shard, set()).add(name)
    missing = sorted(path.name for path in shards if not path.is_file())
    if missing:
        raise ValueError(f"{index} names shards that are missing: {_listed(missing)}; fetch them")
    return shards


def _check_all_shards(files: list[Path]) -> None:
    """Raises ValueError when files named ``...-00001-of-00003...`` are not a complete set."""
    missing = []
    for path in files:
        match = SHARD.search(path.name)
        for number in range(1, 1 + (int(match[2]) if match else 0)):
            sibling = path.name[: match.start(1)] + f"{number:05d}" + path.name[match.end(1) :]
            if path.with_name(sibling) not in files and sibling not in missing:
                missing.append(sibling)
    if missing:
        raise ValueError(f"{files[0].parent} is missing {_listed(missing)}; fetch the missing shards")


def weight_files(directory: str | Path, layout: str | None = None) -> dict[Path, set[str] | None]:
    """Weight files of a Hugging Face directory, and the tensors its index places in each (None without an index).

    safetensors take precedence over ``.bin`` unless ``layout`` names one; the single file over an index, an index over
    other files. Raises ValueError when there are none, or when one that is named or numbered is missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; expected one with *.safetensors or *.bin weights")
    for kind in (SAFETENSORS, BIN) if layout is None else (layout,):
        single = SINGLE[kind]
        if (directory / single).is_file():
            return {directory / single: None}
        index = directory / f"{single}.index.json"
        if index.is_file():
            return dict(_files_of_index(index))
        found = loose_files(directory, kind)
        if found:
            _check_all_shards(found)
            return dict.fromkeys(found)
    raise ValueError(f"{directory} has no weights; expected *.safetensors or *.bin, with an index if sharded")


def _check_index(path: Path, listed: set[str] | None, found: Iterable[str]) -> None:
    absent = sorted((listed or set()) - set(found))
    if absent:
        raise ValueError(f"{path} is missing {_listed(absent)}, which the index places there; fetch it again")


def open_tensors(path: str | Path, layout: str | None = None) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of a backbone on disk, by Hugging Face name, in file order; files are opened one by one.

    path: a Hugging Face or Meta directory, a ``.pkl`` of ours or its directory. layout: one of
    ``backbone.files.layout``; None: the first that is found. Raises ValueError naming what is damaged or missing.
    """
    path = Path(path)
    layout = layout or next(iter(layouts(path)), None)
    if layout == META:
        yield from open_meta(path, read_object(path / META_PARAMS)).tensors.items()
        return
    if layout == PICKLE:
        yield from open_file(path / PICKLE_NAME if path.is_dir() else path).items()
        return
    seen: set[str] = set()
    for file, listed in weight_files(path, layout).items():
        found = open_file(file)
        _check_index(file, listed, found)
        for name, tensor in found.items():
            if name in seen:
                raise ValueError(f"{file}: {name[:MOST]} is in another file as well; expected every tensor once")
            seen.add(name)
            yield name, tensor


def tensor_shapes(path: str | Path) -> dict[str, Shape]:
    """Shape of every tensor, from the files' headers: no weights are read."""
    return {name: tensor.shape for name, tensor in open_tensors(path)}


def read_tensors(path: str | Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of ``open_tensors`` (or those in ``names``), one in memory at a time; types as stored.

    bfloat16 arrives as ``ml_dtypes.bfloat16``. Raises ValueError naming the file for damaged, missing or hostile
    files, and naming the tensors for ``names`` that are missing.
    """
    wanted = None if names is None else set(names)
    seen: set[str] = set()
    for name, tensor in open_tensors(path):
        seen.add(name)
        if wanted is None or name in wanted:
            yield name, tensor.read()
    absent = sorted((wanted or set()) - seen)
    if absent:
        raise ValueError(f"{path} is missing {_listed(absent)}")


# The weights of a backbone --------------------------------------------------------------------------------------------


def expected_shapes(config: BackboneConfig) -> dict[str, Shape]:
    """Hugging Face name -> shape of every weight of a Llama backbone. Matrices are (outputs, inputs)."""
    hidden, wide = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, Shape] = {
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    if not config.tie_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_LISTED
    return ", ".join(name[:MOST] for name in names[:NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")


def check_names(found: Mapping[str, Shape], expected_shapes: Mapping[str, Shape]) -> None:
    """Raises one ValueError that names every missing, extra and misshapen tensor, ten of each kind at most.

    ``*.rotary_emb.inv_freq`` buffers are ignored. A tied checkpoint's own lm_head.weight counts as extra here;
    ``drop_tied_head`` removes it first.
    """
    names = {name for name in found if not ROTARY_BUFFER.search(name)}
    problems = []
    missing = sorted(expected_shapes.keys() - names)
    if missing:
        problems.append(f"{len(missing)} missing: {_listed(missing)}")
    extra = sorted(names - expected_shapes.keys())
    if extra:
        problems.append(f"{len(extra)} extra: {_listed(extra)}")
    misshapen = [
        f"{name[:MOST]} is {tuple(found[name])}, expected {tuple(expected_shapes[name])}"
        for name in sorted(names & expected_shapes.keys())
        if tuple(found[name]) != tuple(expected_shapes[name])
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} misshapen: {_listed(misshapen)}")
    if problems:
        raise ValueError("weights do not match the config: " + "; ".join(problems) + ". Do they belong together?")


def drop_tied_head(
    tensors: Iterable[tuple[str, np.ndarray]], config: BackboneConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Passes tensors on; with tied embeddings without an lm_head.weight that equals the embedding.

    Raises ValueError when the two differ: then the config is wrong about tying, and either choice would give a
    different model. Untied configs pass through unchanged.
    """
    held: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if config.tie_embeddings and name in (EMBEDDING, LM_HEAD):
            held[name] = tensor
            if len(held) == 2:
                if not np.array_equal(held[EMBEDDING], held[LM_HEAD]):
                    raise ValueError(
                        f"{LM_HEAD} differs from {EMBEDDING} though the config ties them; "
                        "set tie_word_embeddings to false in config.json"
                    )
                held = {}
            if name == LM_HEAD:
                continue
        yield name, tensor


def read_backbone(path: str | Path, config: BackboneConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The weights that ``config`` requires, each once, streamed; all names and shapes are checked before the first.

    Raises ValueError as ``check_names``, ``drop_tied_head`` and ``read_tensors`` do, naming the path.
    """
    shapes = tensor_shapes(path)
    expected = expected_shapes(config)
    if config.tie_embeddings and shapes.get(LM_HEAD) == expected[EMBEDDING]:
        del shapes[LM_HEAD]  # its numbers are compared while streaming
    try:
        check_names(shapes, expected)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, tensor in drop_tied_head(read_tensors(path), config):
        if not ROTARY_BUFFER.search(name):
            yield name, tensor


class Fingerprint:
    """Names a backbone by its config and every weight, in whatever order the weights arrive.

    Each tensor is hashed (name, dtype, shape, bytes) as it arrives; the digest hashes the canonical config JSON and
    those hashes in the order of names. Two loaders agree when they add the same arrays in the same dtype.
    """

    def __init__(self, config: BackboneConfig) -> None:
        self._config = identity(dataclasses.asdict(config), sort_keys=True, separators=(",", ":"))
        self._tensors: dict[str, bytes] = {}

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Add one tensor; each name once."""
        assert name not in self._tensors, f"{name} was added twice"
        header = identity([name, tensor.dtype.name, list(tensor.shape)])
        digest = hashlib.sha256(header.encode())
        # reshape(-1) first: bfloat16 has no buffer of its own, its bytes do.
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
        self._tensors[name] = digest.digest()

    def hexdigest(self) -> str:
        """16 hexadecimal digits over everything added so far."""
        digest = hashlib.sha256(self._config.encode())
        for name in sorted(self._tensors):
            digest.update(self._tensors[name])
        return digest.hexdigest()[:16]


def fingerprint(config: BackboneConfig, tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """The ``Fingerprint`` of a config and a stream of (name, array): 16 hexadecimal digits."""
    running = Fingerprint(config)
    for name, tensor in tensors:
        running.add(name, tensor)
    return running.hexdigest()
