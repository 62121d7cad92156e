"""Reads Meta's own checkpoints: params.json with consolidated.00.pth, consolidated.01.pth, ...

Each .pth is one rank's share of a model-parallel Llama. Column-parallel matrices (wq wk wv w1 w3 output) hold some of
the outputs, so their rows are concatenated; row-parallel ones (wo w2) hold some of the inputs, so their columns are
concatenated; norms are replicated in every shard. The embedding is split over dim in Llama 1 and 2 and over the
vocabulary in Llama 3: with n shards, a shard as wide as dim is split over the vocabulary, one of width dim / n over
dim.

Meta rotates neighboring coordinates (2i, 2i + 1) of a query or key by the i-th angle, Hugging Face's models rotate
coordinates (i, i + head_dim / 2): the rows of wq and wk are reordered within each head, which leaves all products of
queries and keys unchanged. With head_dim 4, Meta's rows 0 1 2 3 become rows 0 2 1 3, because its pairs (0 1) (2 3)
become (0 2) (1 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backbone.files.layout import META_PARAMS as PARAMS
from backbone.files.layout import META_SHARD as SHARD
from backbone.files.layout import MOST_COUNT, MOST_LAYERS, MOST_NUMBER
from backbone.files.lazy import LazyTensor, Shape, join_columns, join_rows, map_rows
from backbone.files.torch_file import open_torch_file
from runtime.files.shown import MOST, shown

# The rotary frequencies follow from params.json.
IGNORED = re.compile(r"(^|\.)rope\.freqs$")
EMBEDDING, NORM, OUTPUT = "tok_embeddings.weight", "norm.weight", "output.weight"
# Meta's name -> ours, within a layer. Split over outputs (rows), over inputs (columns), or replicated.
ROWS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
}
COLUMNS = {"attention.wo": "self_attn.o_proj", "feed_forward.w2": "mlp.down_proj"}
WHOLE = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
ROTATED = ("attention.wq", "attention.wk")
TOP = {EMBEDDING: "model.embed_tokens.weight", NORM: "model.norm.weight", OUTPUT: "lm_head.weight"}

REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")
OPTIONAL = ("n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "rope_theta", "use_scaled_rope")
# What use_scaled_rope means in Meta's code since Llama 3.1.
SCALED_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3_THETA = 500000.0
NAMES_LISTED = 10
MOST_SHARDS = 100  # their numbers have two digits


@dataclass(frozen=True)
class MetaCheckpoint:
    """``config``: the contents that a config.json would have. ``tensors`` by Hugging Face name, in its row order.
    ``notes``: what was derived from the tensors. ``assumed``: what params.json leaves open, and the value taken."""

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    notes: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


def layer_name(index: int, part: str) -> str:
    """Name of a layer's tensor in either naming: ``layers.0.attention.wq.weight``."""
    return f"layers.{index}.{part}.weight"


def to_half_split(weight: LazyTensor, head_dim: int) -> LazyTensor:
    """Rows of wq or wk from Meta's order, (pairs, 2) in a head, to Hugging Face's, (2, pairs)."""
    return map_rows(weight, head_dim, lambda rows: _swap(rows, head_dim // 2, 2))


def to_interleaved(weight: LazyTensor, head_dim: int) -> LazyTensor:
    """The inverse of ``to_half_split``."""
    return map_rows(weight, head_dim, lambda rows: _swap(rows, 2, head_dim // 2))


def _swap(rows: np.ndarray, outer: int, inner: int) -> np.ndarray:
    return rows.reshape(-1, outer, inner, rows.shape[1]).transpose(0, 2, 1, 3).reshape(rows.shape)


def feed_forward_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the MLP: two thirds of 4 dim, times the multiplier, rounded up to a multiple; Meta's formula."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * -(-size // multiple_of)


def shard_files(directory: Path) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth, ...; ValueError when there are none or one between them is missing."""
    found = {int(match[1]): path for path in directory.iterdir() if (match := SHARD.match(path.name))}
    if not found:
        raise ValueError(f"{directory} has no consolidated.00.pth; expected Meta's weights with {PARAMS}")
    _check_count(directory, found, max(found) + 1)
    return [found[number] for number in sorted(found)]


def _check_count(directory: Path, found: Iterable[int], count: int) -> None:
    missing = sorted(set(range(min(count, MOST_SHARDS))) - set(found))
    if missing:
        named = _listed([f"consolidated.{number:02d}.pth" for number in missing])
        raise ValueError(f"{directory} is missing {named}: the model has {count} shards; fetch the missing ones")


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_LISTED
    return ", ".join(name[:MOST] for name in names[:NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")


class _Params:
    """params.json, checked. Raises ValueError naming the field."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        unknown = sorted(set(raw) - {*REQUIRED, *OPTIONAL})
        if unknown:
            raise ValueError(f"{where}: {_listed(unknown)} is not supported; known: {', '.join(REQUIRED + OPTIONAL)}")
        self._raw, self._where = raw, where
        self.dim, self.layers, self.heads = (self._number(key, int) for key in ("dim", "n_layers", "n_heads"))
        self.kv_heads = self._number("n_kv_heads", int, self.heads)
        self.eps = self._number("norm_eps", float)
        self.theta = self._number("rope_theta", float, 10000.0)
        self.vocab = None if raw.get("vocab_size") in (-1, None) else self._number("vocab_size", int)
        self.multiple_of = None if raw.get("multiple_of") is None else self._number("multiple_of", int)
        multiplier = raw.get("ffn_dim_multiplier")
        self.multiplier = None if multiplier is None else self._number("ffn_dim_multiplier", float)
        self.scaled = False if raw.get("use_scaled_rope") is None else raw["use_scaled_rope"]
        if not isinstance(self.scaled, bool):
            raise ValueError(f"{where}: use_scaled_rope is {shown(self.scaled)}, expected true or false")
        if self.dim % self.heads or self.dim // self.heads % 2 or self.heads % self.kv_heads:
            raise ValueError(
                f"{where}: dim {self.dim}, n_heads {self.heads} and n_kv_heads {self.kv_heads} do not divide as those "
                "of a Llama: expected dim in n_heads even parts, and n_heads a multiple of n_kv_heads"
            )
        self.head_dim = self.dim // self.heads

    def _number(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._raw.get(key)
        value = default if value is None else value
        allowed = (int, float) if kind is float else (int,)
        most = MOST_LAYERS if key == "n_layers" else MOST_COUNT if kind is int else MOST_NUMBER
        if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value <= most:
            raise ValueError(f"{self._where}: {key} is {shown(value)}, expected a positive number up to {most:,}")
        return kind(value)


def _replicated(parts: list[LazyTensor]) -> LazyTensor:
    """A tensor replicated in every shard. Reading raises ValueError where the shards differ."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        first, *others = (part.read_rows(start, stop) for part in parts)
        if any(other.tobytes() != first.tobytes() for other in others):
            raise ValueError("it differs between the shards; expected the same in each")
        return first

    return LazyTensor(parts[0].dtype, parts[0].shape, read_rows)


def _named(tensor: LazyTensor, where: str) -> LazyTensor:
    """The tensor, with its origin in its errors."""

    def read_rows(start: int, stop: int) -> np.ndarray:
        try:
            return tensor.read_rows(start, stop)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    return LazyTensor(tensor.dtype, tensor.shape, read_rows)


class _Shards:
    """The shards of one model, and its assembled tensors."""

    def __init__(self, directory: Path, params: _Params) -> None:
        self.directory, self.params = directory, params
        self.files = shard_files(directory)
        self.shards = [open_torch_file(path) for path in self.files]
        self._check_names()
        # The number of rows of wq in a shard reveals a missing last shard.
        share = self.shards[0][layer_name(0, "attention.wq")].shape
        if len(share) == 2 and share[0] and params.dim % share[0] == 0:
            _check_count(directory, range(len(self.files)), params.dim // share[0])
        self.notes: list[str] = []

    def _check_names(self) -> None:
        wanted = {EMBEDDING, NORM, OUTPUT}
        for index in range(self.params.layers):
            wanted |= {layer_name(index, part) for part in (*ROWS, *COLUMNS, *WHOLE)}
        for path, shard in zip(self.files, self.shards, strict=True):
            names = {name for name in shard if not IGNORED.search(name)}
            problems = []
            if missing := sorted(wanted - names - {OUTPUT}):
                problems.append(f"{len(missing)} missing: {_listed(missing)}")
            if extra := sorted(names - wanted):
                problems.append(f"{len(extra)} extra: {_listed(extra)}")
            if (OUTPUT in shard) != (OUTPUT in self.shards[0]):
                problems.append(f"{OUTPUT} is in some of the shards only")
            if problems:
                raise ValueError(f"{path}: tensors do not match {PARAMS}: {'; '.join(problems)}")

    def take(self, name: str, expected: Shape, join: Callable[[list[LazyTensor]], LazyTensor]) -> LazyTensor:
        """One tensor from all shards. ValueError naming it when its shape is not the expected one."""
        parts = [shard[name] for shard in self.shards]
        where = f"{self.directory}: {name}"
        if any(len(part.shape) != len(expected) for part in parts):
            raise ValueError(f"{where} is {parts[0].shape} in a shard, expected {len(expected)} axes")
        try:
            joined = join(parts)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if joined.shape != expected:
            raise ValueError(
                f"{where} is {joined.shape} from {len(parts)} shards of {parts[0].shape}, "
                f"expected {expected} by {PARAMS}"
            )
        return _named(joined, where)

    def embedding(self) -> LazyTensor:
        """The embedding; its rows are the vocabulary if params.json leaves that open."""
        share, count, dim = self.shards[0][EMBEDDING].shape, len(self.shards), self.params.dim
        over_dim = count > 1 and len(share) == 2 and share[1] * count == dim
        if count > 1:
            self.notes.append(
                f"the embedding's {count} shards are {share}: split over {'dim' if over_dim else 'the vocabulary'}"
            )
        rows = share[0] if over_dim or len(share) != 2 else sum(shard[EMBEDDING].num_rows for shard in self.shards)
        vocab = self.params.vocab or rows
        return self.take(EMBEDDING, (vocab, dim), join_columns if over_dim else join_rows)


def _feed_forward_size(shards: _Shards) -> int:
    """From the tensors; params.json must agree where it has the fields."""
    params, name = shards.params, layer_name(0, "feed_forward.w1")
    size = sum(shard[name].num_rows for shard in shards.shards)
    if params.multiple_of is not None:
        expected = feed_forward_size(params.dim, params.multiple_of, params.multiplier)
        if size != expected:
            raise ValueError(
                f"{shards.directory}: {name} has {size} rows in all shards, expected {expected} by multiple_of "
                f"{params.multiple_of} and ffn_dim_multiplier {params.multiplier} of {PARAMS}"
            )
    return size


def _config(params: _Params, vocab: int, wide: int, tied: bool, dtype: np.dtype, assumed: list[str]) -> dict[str, Any]:
    """The content of a config.json, from params.json and the tensors; what neither has goes into ``assumed``."""
    if params.scaled:
        longest, family = 131072, "Llama 3.1"
        assumed.append(
            f"use_scaled_rope comes without its factor: {SCALED_ROPE['factor']:g} is assumed, as in Llama 3.1; "
            "Llama 3.2 has 32"
        )
    elif params.theta == LLAMA_3_THETA:
        longest, family = 8192, "Llama 3"
    else:
        longest, family = 2048, "Llama 1 (Llama 2 has 4096)"
    assumed.append(
        f"{PARAMS} has no number of trained positions: {longest} is assumed, as in {family}; nor the tokens that begin "
        "and end a text: none is assumed. A config.json in the same folder provides them"
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": vocab,
        "hidden_size": params.dim,
        "intermediate_size": wide,
        "num_hidden_layers": params.layers,
        "num_attention_heads": params.heads,
        "num_key_value_heads": params.kv_heads,
        "head_dim": params.head_dim,
        "rms_norm_eps": params.eps,
        "rope_theta": params.theta,
        "rope_scaling": dict(SCALED_ROPE) if params.scaled else None,
        "max_position_embeddings": longest,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype.name,
    }


def open_meta(directory: str | Path, params: dict[str, Any]) -> MetaCheckpoint:
    """A Meta directory. params: the contents of its params.json. Only headers are read.

    A checkpoint without output.weight has tied embeddings. Raises ValueError naming the file, field or tensor for
    missing shards, unknown fields, and missing, extra or misshapen tensors.
    """
    directory = Path(directory)
    checked = _Params(params, str(directory / PARAMS))
    shards = _Shards(directory, checked)
    embedding = shards.embedding()
    vocab, dim, head_dim = embedding.shape[0], checked.dim, checked.head_dim
    wide = _feed_forward_size(shards)
    key_value = checked.kv_heads * head_dim
    outputs = dict(zip(ROWS, (dim, key_value, key_value, wide, wide), strict=True))
    inputs = dict(zip(COLUMNS, (dim, wide), strict=True))
    tensors = {TOP[EMBEDDING]: embedding}
    for index in range(checked.layers):
        found = {part: shards.take(layer_name(index, part), (outputs[part], dim), join_rows) for part in ROWS}
        found |= {part: to_half_split(found[part], head_dim) for part in ROTATED}
        found |= {part: shards.take(layer_name(index, part), (dim, inputs[part]), join_columns) for part in COLUMNS}
        found |= {part: shards.take(layer_name(index, part), (dim,), _replicated) for part in WHOLE}
        for part, ours in (ROWS | COLUMNS | WHOLE).items():
            tensors[f"model.{layer_name(index, ours)}"] = found[part]
    tensors[TOP[NORM]] = shards.take(NORM, (dim,), _replicated)
    tied = OUTPUT not in shards.shards[0]
    if not tied:
        tensors[TOP[OUTPUT]] = shards.take(OUTPUT, (vocab, dim), join_rows)
    assumed: list[str] = []
    config = _config(checked, vocab, wide, tied, embedding.dtype, assumed)
    return MetaCheckpoint(config, tensors, shards.notes, assumed)
