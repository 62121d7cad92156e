"""The configuration of a backbone, read from ``config.json``, Meta's ``params.json`` or a ``.pkl`` of ours.

Only what our forward pass computes is accepted; anything else is refused by name before weights are read, because a
backbone that ignores a setting gives wrong numbers instead of an error.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backbone.files.layout import META, MOST_COUNT, MOST_LAYERS, MOST_NUMBER, PICKLE_FILE, container, layouts
from backbone.files.layout import META_PARAMS as PARAMS
from backbone.files.meta import open_meta
from backbone.files.pickle_file import open_pickle_file
from runtime.files.documents import read_object
from runtime.files.shown import shown

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
ROPE_TYPES = ("default", "linear", "llama3")
# Defaults of the two families where config.json has no value (those of their transformers configurations).
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
# Fields that params.json and the tensors determine.
META_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "rms_norm_eps", "rope_theta",
)  # fmt: skip
# Llama-1 conversions of 2023 spell the first one in capitals.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "LLaMAForCausalLM": "llama", "MistralForCausalLM": "mistral"}


@dataclass(frozen=True)
class BackboneConfig:
    """Sizes and constants of a backbone.

    ``rope_scaling`` is None for plain rotary positions, else ``{"rope_type": "linear", "factor": f}`` or the llama3
    dictionary with its five keys. ``max_positions`` counts tokens. ``eos_ids`` may be empty.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_positions: int
    tie_embeddings: bool
    model_type: str
    bos_id: int | None
    eos_ids: tuple[int, ...]
    attention_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}; "
                "every key-value head needs the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding rotates pairs of coordinates")


def _number(raw: dict, key: str, where: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MOST_NUMBER:
        raise ValueError(f"{where}: {key} is {shown(value)}, expected a positive number up to {MOST_NUMBER:g}")
    return float(value)


def _count(raw: dict, key: str, where: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    most = MOST_LAYERS if key == "num_hidden_layers" else MOST_COUNT
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{where}: {key} is {shown(value)}, expected a positive whole number up to {most:,}")
    return value


def _token_ids(value: Any, key: str, where: str) -> tuple[int, ...]:
    """One id, a list of ids or null, as a tuple."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id <= MOST_COUNT:
            raise ValueError(f"{where}: {key} is {shown(value)}, expected a token id or a list of token ids")
    return tuple(ids)


def stop_ids(directory: str | Path) -> tuple[int, ...]:
    """The tokens that end a text: those of generation_config.json if it names any, else those of config.json; empty
    where neither does. So does transformers, but for a generation_config.json that names none: it then never stops.
    Raises ValueError naming the file."""
    for path in (Path(directory) / GENERATION_CONFIG, Path(directory) / CONFIG):
        ids = _token_ids(read_object(path).get("eos_token_id"), "eos_token_id", str(path)) if path.exists() else ()
        if ids:
            return ids
    return ()


def _family(raw: dict, where: str) -> str:
    """The family, llama or mistral. Raises ValueError for an unsupported architecture."""
    supported = "supported: " + ", ".join(sorted(set(ARCHITECTURES) - {"LLaMAForCausalLM"}))
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"{where}: architectures is {shown(architectures)}, expected a list; {supported}")
    for architecture in architectures:
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ValueError(f"{where}: architecture {shown(architecture)} is not supported; {supported}")
    model_type = raw.get("model_type")
    if model_type is None and architectures:
        model_type = ARCHITECTURES[architectures[0]]
    if not isinstance(model_type, str) or model_type not in FAMILY_DEFAULTS:
        raise ValueError(f"{where}: model_type {shown(model_type)} is not supported; {supported}")
    return model_type


def _rope(raw: dict, max_positions: int, where: str) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (older).

    As in transformers, a ``rope_scaling`` that is not empty replaces ``rope_parameters``, its base included: tools that
    extend a context write it beside what they found. A base of its own comes first, then the one at the top.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(key) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {key} is {shown(given)}, expected an object with rope_type")
    theta_holder = given if given.get("rope_theta") is not None else raw
    theta = _number(theta_holder, "rope_theta", where, default=10000.0)
    inner = f"{where}, {key}"
    rope_type = next((given[name] for name in ("rope_type", "type") if given.get(name) is not None), "default")
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"{inner}: rope_type {shown(rope_type)} is not supported; supported: {', '.join(ROPE_TYPES)}")
    nested = next((name for name, value in given.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise ValueError(f"{inner}: {shown(nested)} has settings of its own; expected the same for all layers")
    if any(holder.get("partial_rotary_factor") not in (None, 1, 1.0) for holder in (given, raw)):
        raise ValueError(f"{where}: partial_rotary_factor below 1 is not supported; expected 1.0 or none")
    if rope_type == "default":
        return theta, None
    scaling: dict[str, Any] = {"rope_type": rope_type, "factor": _number(given, "factor", inner)}
    if rope_type == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            scaling[name] = _number(given, name, inner)
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise ValueError(f"{inner}: high_freq_factor must be above low_freq_factor")
        original = "original_max_position_embeddings"
        holder = raw if raw.get(original) is not None else given  # transformers' order
        scaling[original] = _count(holder, original, inner, default=max_positions)
    return theta, scaling


def parse_config(
    raw: dict[str, Any], generation: dict[str, Any] | None = None, where: str = "config"
) -> BackboneConfig:
    """The config from the contents of ``config.json`` and ``generation_config.json``; ``where`` names them in errors.

    Raises ValueError for whatever our forward pass does not compute, naming the key and the value.
    """
    family = _family(raw, where)
    defaults = FAMILY_DEFAULTS[family]
    activation = raw.get("hidden_act") or "silu"
    if activation != "silu":
        raise ValueError(f"{where}: hidden_act {shown(activation)} is not supported; expected 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(
                f"{where}: {key} is {shown(raw[key])}; backbones with biases are not supported, expected false"
            )
    if raw.get("quantization_config"):
        raise ValueError(f"{where}: quantization_config is set; expected float16, bfloat16 or float32 weights")

    num_heads = _count(raw, "num_attention_heads", where)
    hidden_size = _count(raw, "hidden_size", where)
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(
            f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads} "
            "and head_dim is not given; add head_dim"
        )
    # Llama-1 conversions of 2023 have max_sequence_length.
    longest = raw.get("max_sequence_length") or defaults["max_position_embeddings"]
    max_positions = _count(raw, "max_position_embeddings", where, default=longest)
    window = raw.get("sliding_window", defaults["sliding_window"])
    if family == "mistral" and window is not None:
        window = _count({"sliding_window": window}, "sliding_window", where)
    if family == "mistral" and window is not None and window < max_positions:
        raise ValueError(
            f"{where}: sliding_window {window} is below max_position_embeddings {max_positions}; sliding-window "
            "attention is not supported, expected null or a window that covers every position"
        )
    theta, scaling = _rope(raw, max_positions, where)
    bos_ids = _token_ids(raw.get("bos_token_id"), "bos_token_id", where)
    eos_ids = _token_ids(raw.get("eos_token_id"), "eos_token_id", where)
    generation_eos = (generation or {}).get("eos_token_id")
    eos_ids += _token_ids(generation_eos, "eos_token_id", f"{where} (generation)")
    sizes = dict(
        vocab_size=_count(raw, "vocab_size", where),
        hidden_size=hidden_size,
        intermediate_size=_count(raw, "intermediate_size", where),
        num_layers=_count(raw, "num_hidden_layers", where),
        num_heads=num_heads,
        num_kv_heads=_count(raw, "num_key_value_heads", where, default=defaults["num_key_value_heads"] or num_heads),
        head_dim=_count(raw, "head_dim", where, default=hidden_size // num_heads),
        rms_norm_eps=_number(raw, "rms_norm_eps", where, default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=max_positions,
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        model_type=family,
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=tuple(dict.fromkeys(eos_ids)),
    )
    try:
        return BackboneConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@dataclass(frozen=True)
class RawConfig:
    """The contents of ``config.json`` and ``generation_config.json``, and the file that errors name.

    ``notes``: what was derived from the tensors. ``assumed``: what no file specifies, and the value taken.
    """

    config: dict[str, Any]
    generation: dict[str, Any] | None
    where: str
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def parse(self) -> BackboneConfig:
        """The ``BackboneConfig``. Raises ValueError as ``parse_config`` does."""
        return parse_config(self.config, self.generation, self.where)


def read_raw_config(path: str | Path, meta: bool | None = None) -> RawConfig:
    """The config of a Hugging Face or Meta directory or of a ``.pkl``, in the form of a config.json.

    A Meta directory may also have a config.json: it fills in what params.json leaves open and must agree with the rest.
    meta: whether to read the directory as Meta's; None: if its weights are in that format.
    """
    path = Path(path)
    if path.is_file():
        return _config_of_pickle(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; expected a Hugging Face model directory with config.json")
    generation_path = path / GENERATION_CONFIG
    generation = read_object(generation_path) if generation_path.exists() else None
    has_config = (path / CONFIG).exists()
    if meta is None:
        meta = layouts(path)[:1] == [META] or ((path / PARAMS).exists() and not has_config)
    if not meta:
        return RawConfig(read_object(path / CONFIG), generation, str(path / CONFIG))
    found = open_meta(path, read_object(path / PARAMS))
    derived = RawConfig(found.config, generation, str(path / PARAMS), tuple(found.notes), tuple(found.assumed))
    if not has_config:
        return derived
    raw = RawConfig(read_object(path / CONFIG), generation, str(path / CONFIG), derived.notes)
    _check_agreement(raw, derived)
    return raw


def _check_agreement(raw: RawConfig, derived: RawConfig) -> None:
    """Raises ValueError naming every size that config.json and params.json give differently."""
    first, second = raw.parse(), derived.parse()
    pairs = [(key, getattr(first, key), getattr(second, key)) for key in META_FIELDS]
    wrong = [f"{key} {one} and {other}" for key, one, other in pairs if one != other]
    scaled = [(config.rope_scaling or {}).get("rope_type") for config in (first, second)]
    if scaled[0] != scaled[1]:
        wrong.append(f"rope scaling {scaled[0]} and {scaled[1]}")
    if wrong:
        raise ValueError(f"{raw.where} and {derived.where} do not agree: {'; '.join(wrong)}. Do both belong together?")


def _config_of_pickle(path: Path) -> RawConfig:
    """The entries ``config`` and ``generation_config`` of a ``.pkl``, or config.json in its folder."""
    if container(path) != PICKLE_FILE:
        raise ValueError(f"{path} is one file of a backbone; pass its folder")
    _, rest = open_pickle_file(path)
    if "config" not in rest:
        if (path.parent / CONFIG).exists():
            return read_raw_config(path.parent, meta=False)
        raise ValueError(f"{path} has no entry 'config', and its folder has no {CONFIG}; expected one of them")
    config, generation = rest["config"], rest.get("generation_config")
    if not isinstance(config, dict) or not isinstance(generation, dict | None):
        raise ValueError(f"{path}: config is a {type(config).__name__}, expected what a {CONFIG} holds")
    return RawConfig(config, generation, str(path))


def read_config(path: str | Path) -> BackboneConfig:
    """The config of a backbone: a Hugging Face directory (``config.json``, and the end tokens of
    ``generation_config.json``), a Meta directory (``params.json``) or a ``.pkl`` of ours.

    Warns about what Meta's file leaves open and the values taken instead.
    """
    raw = read_raw_config(path)
    for line in raw.assumed:
        warnings.warn(f"{path}: {line}", stacklevel=2)
    return raw.parse()


def rope_inverse_frequencies(config: BackboneConfig) -> np.ndarray:
    """Rotation angle per position of every pair of coordinates: (head_dim / 2,) float32.

    Plain: ``theta ** (-2 i / head_dim)`` (RoFormer, arXiv 2104.09864, section 3.2.2). linear divides all of them by
    ``factor``. llama3 (Llama 3.1) divides only the slow ones: a pair whose wavelength is above
    ``original / low_freq_factor`` is divided, one below ``original / high_freq_factor`` is unchanged, and between the
    two the results are blended. All arithmetic is float32, as in the code that trained the published weights.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = np.float32(1.0) / np.power(np.float32(config.rope_theta), exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    slowed = plain / np.float32(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return slowed
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = np.float32(2 * math.pi) / plain
    share = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - share) * slowed + share * plain
    result = np.where(wavelengths > original / low, slowed, np.where(wavelengths < original / high, plain, blended))
    return result.astype(np.float32)
