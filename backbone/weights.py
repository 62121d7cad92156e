"""Reads backbone weights from disk, one tensor at a time, and says exactly what is wrong with them.

Files from outside are data, never code. ``*.safetensors`` is data by design; ``*.bin`` is read by ``torch_file``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors import SafetensorError, safe_open

from backbone.config import BackboneConfig, read_json
from backbone.torch_file import Shape, damaged, read_torch_file, torch_shapes

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# Old conversions save the rotary frequencies as buffers; they follow from the config.
ROTARY_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|bin)$")
# What trainers leave beside the weights under the same suffix.
NOT_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|random_states.*|consolidated.*)\.(bin|safetensors)$")
NAMES_LISTED = 10


# safetensors ---------------------------------------------------------------------------------------------------------


def read_safetensors_file(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of one ``*.safetensors`` file. Raises ValueError naming the file when it is damaged."""
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (a reader, not a dict)
                try:
                    tensor = file.get_tensor(name)
                except (AttributeError, TypeError) as error:
                    raise ValueError(f"tensor {name} has a type without a NumPy equivalent ({error})") from error
                yield name, tensor
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error


def _safetensors_shapes(path: Path) -> dict[str, Shape]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error


# Directories ---------------------------------------------------------------------------------------------------------


def _files_of_index(index: Path) -> dict[Path, set[str]]:
    """The shards that an index names, and the tensors it places in each."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, expected an object of tensor name to file name")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        # Judged by its spelling: caches link shards to other folders, and those links are the user's own.
        if not isinstance(shard, str) or "\\" in shard or PurePosixPath(shard).name != shard or shard in ("", ".."):
            raise ValueError(f"{index} places {name} in {shard!r}, outside its own folder; expected a bare file name")
        shards.setdefault(index.parent / shard, set()).add(name)
    missing = sorted(path.name for path in shards if not path.is_file())
    if missing:
        raise ValueError(f"{index} names shards that are missing: {_listed(missing)}; fetch them")
    return shards


def _check_all_shards(files: list[Path]) -> None:
    """Files named ``...-00001-of-00003...`` come in full sets."""
    for path in files:
        match = SHARD.search(path.name)
        if match is None:
            continue
        for number in range(1, int(match.group(2)) + 1):
            sibling = path.name[: match.start(1)] + f"{number:05d}" + path.name[match.end(1) :]
            if path.with_name(sibling) not in files:
                raise ValueError(f"{path.with_name(sibling)} is missing beside {path.name}; fetch the missing shard")


def weight_files(directory: str | Path) -> dict[Path, set[str] | None]:
    """Weight files of a Hugging Face directory, and the tensors its index places in each (None without an index).

    safetensors win over ``.bin``; the single file wins over an index, an index over the files found beside it.
    Raises ValueError when there are none, or when one that is named or numbered is missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; expected one with *.safetensors or *.bin weights")
    for single, pattern in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "*.bin")):
        if (directory / single).is_file():
            return {directory / single: None}
        index = directory / f"{single}.index.json"
        if index.is_file():
            return dict(_files_of_index(index))
        found = sorted(path for path in directory.glob(pattern) if not NOT_WEIGHTS.match(path.name))
        if found:
            _check_all_shards(found)
            return dict.fromkeys(found)
    raise ValueError(f"{directory} holds no weights; expected *.safetensors or *.bin, with an index if sharded")


def _check_index(path: Path, promised: set[str] | None, found: Iterable[str]) -> None:
    absent = sorted((promised or set()) - set(found))
    if absent:
        raise ValueError(f"{path} lacks {_listed(absent)}, which the index places there; fetch it again")


def tensor_shapes(directory: str | Path) -> dict[str, Shape]:
    """Shape of every tensor in the directory, from the files' headers: no weights are read."""
    shapes: dict[str, Shape] = {}
    for path, promised in weight_files(directory).items():
        found = _safetensors_shapes(path) if path.suffix == ".safetensors" else torch_shapes(path)
        _check_index(path, promised, found)
        for name, shape in found.items():
            if name in shapes:
                raise ValueError(f"{path}: {name} is in another file too; expected every tensor once")
            shapes[name] = shape
    return shapes


def read_tensors(directory: str | Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a directory (or those in ``names``) in file order, one in memory at a time; types as stored.

    bfloat16 arrives as ``ml_dtypes.bfloat16``. Raises ValueError naming the file for damaged, missing or hostile
    files, and naming the tensors for ``names`` that are nowhere.
    """
    wanted = None if names is None else set(names)
    seen: set[str] = set()
    for path, promised in weight_files(directory).items():
        reader = read_safetensors_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
        in_file = set()
        for name, tensor in reader:
            if name in seen:
                raise ValueError(f"{path}: {name} is in another file too; expected every tensor once")
            seen.add(name)
            in_file.add(name)
            if wanted is None or name in wanted:
                yield name, tensor
        _check_index(path, promised, in_file)
    absent = sorted((wanted or set()) - seen)
    if absent:
        raise ValueError(f"{directory} lacks {_listed(absent)}")


# What a backbone must hold -------------------------------------------------------------------------------------------


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
    return ", ".join(names[:NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")


def check_names(found: Mapping[str, Shape], expected_shapes: Mapping[str, Shape]) -> None:
    """Raises one ValueError that names every missing, extra and misshapen tensor, ten of each kind at most.

    ``*.rotary_emb.inv_freq`` buffers are ignored. For a tied checkpoint that carries its own lm_head.weight pass the
    tensors through ``drop_tied_head`` (or the shapes through ``read_backbone``) first: here it counts as extra.
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
        f"{name} is {tuple(found[name])}, expected {tuple(expected_shapes[name])}"
        for name in sorted(names & expected_shapes.keys())
        if tuple(found[name]) != tuple(expected_shapes[name])
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} misshapen: {_listed(misshapen)}")
    if problems:
        raise ValueError("weights do not match the config: " + "; ".join(problems) + ". Do both belong together?")


def drop_tied_head(
    tensors: Iterable[tuple[str, np.ndarray]], config: BackboneConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Passes tensors on; with tied embeddings it leaves out an lm_head.weight equal to the embedding.

    Raises ValueError when the two differ: then the config is wrong about them being tied, and either choice would
    give a different model. Untied configs pass through untouched.
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


def read_backbone(directory: str | Path, config: BackboneConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The weights that ``config`` calls for, each once, streamed; names and shapes are all checked before the first.

    Raises ValueError as ``check_names``, ``drop_tied_head`` and ``read_tensors`` do, naming the directory.
    """
    shapes = tensor_shapes(directory)
    expected = expected_shapes(config)
    if config.tie_embeddings and shapes.get(LM_HEAD) == expected[EMBEDDING]:
        del shapes[LM_HEAD]  # its numbers are compared while streaming
    try:
        check_names(shapes, expected)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    for name, tensor in drop_tied_head(read_tensors(directory), config):
        if not ROTARY_BUFFER.search(name):
            yield name, tensor


class Fingerprint:
    """Names a backbone by its config and every weight, whatever order the weights arrive in.

    Each tensor is hashed (name, dtype, shape, bytes) as it streams by; the digest hashes the canonical config JSON and
    those hashes in the order of the names. Two loaders agree when they add the same arrays in the same dtype.
    """

    def __init__(self, config: BackboneConfig) -> None:
        self._config = json.dumps(dataclasses.asdict(config), sort_keys=True, separators=(",", ":"))
        self._tensors: dict[str, bytes] = {}

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Count one tensor in. Each name once."""
        assert name not in self._tensors, f"{name} was added twice"
        header = json.dumps([name, tensor.dtype.name, list(tensor.shape)])
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
