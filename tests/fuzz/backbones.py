"""The files of backbones: configs, headers, indices, params.json and pickles, harmless and hostile."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from backbone.config import read_config
from backbone.files import meta
from backbone.files.lazy import in_memory
from backbone.files.pickle_file import open_pickle_file
from backbone.formats.containers import write_pickle, write_safetensors, write_torch
from backbone.weights import expected_shapes, open_file, open_tensors
from tests.fuzz.inputs import Kind, bytes_changed, changed, files, one, values, written

ROOT = Path(__file__).resolve().parents[2]

LLAMA = json.loads((ROOT / "assets" / "tiny-vicuna" / "config.json").read_text())
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
CONFIGS = [
    LLAMA, MISTRAL, {**LLAMA, "rope_scaling": SCALED}, {**LLAMA, "rope_parameters": {**SCALED, "rope_theta": 5e5}}
]  # fmt: skip


def read_backbone_config(folder):
    config = read_config(folder)
    assert all(0 < size < 2**31 for size in (config.vocab_size, config.hidden_size, config.num_layers))
    assert len(expected_shapes(config)) <= 9 * config.num_layers + 3


CONFIG = Kind(
    st.fixed_dictionaries(
        {"config.json": files(CONFIGS, 2)}, optional={"generation_config.json": files([{"eos_token_id": [2, 16]}])}
    ),
    read_backbone_config,
)


def of_writer(write, name, *rest, tensors=None):
    """The bytes that a writer gives for some tensors, without any for two small ones."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    path = folder / f"gorgon-fuzz-{os.getpid()}-{name}"
    two = {"model.norm.weight": np.ones(4, np.float32), "b": np.arange(6, dtype=np.int32).reshape(2, 3)}
    tensors = tensors or two
    write(path, {key: in_memory(array) for key, array in tensors.items()}, *rest)
    content = path.read_bytes()
    path.unlink()
    return content


SAFETENSORS = of_writer(write_safetensors, "a.safetensors")
TORCH = of_writer(write_torch, "a.bin")
PICKLE = of_writer(write_pickle, "a.pkl", {"config": LLAMA, "files": {"tokenizer.json": b"{}"}})


def with_header(header):
    """A safetensors file with this header."""
    return len(header).to_bytes(8, "little") + header + SAFETENSORS[-40:]


HEADER = json.loads(SAFETENSORS[8 : 8 + int.from_bytes(SAFETENSORS[:8], "little")])
headers = st.one_of(changed(HEADER), values()).map(written)
safetensors = st.one_of(bytes_changed(SAFETENSORS), headers.map(with_header), headers.map(with_header))


def read_all(tensors, folder):
    """Every number of the tensors, which cannot be more than the files hold."""
    held = sum(path.stat().st_size for path in Path(folder).iterdir())
    for tensor in tensors.values():
        assert tensor.nbytes <= held, (tensor.shape, held)
        assert tensor.read().nbytes == tensor.nbytes


def read_weights(folder):
    read_all(open_file(folder / "model.safetensors"), folder)


INDEX = {"metadata": {"total_size": 40}, "weight_map": {"model.norm.weight": "a.safetensors", "b": "a.safetensors"}}


def read_index(folder):
    read_all(dict(open_tensors(folder)), folder)


class _Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = [
    pickle.dumps(each, 4)
    for each in (
        _Call(os.system, "true"), _Call(eval, "1+1"), _Call(os.mkdir, "/nonexistent/x"), {"a": _Call(exec, "1")},
        [[[[]]]], {"a": {1: {2: 3}}}, {1: 2}, {"a": "x" * 100}, {"config": {"vocab_size": 10**40}}, np.ones(3), 5,
    )
]  # fmt: skip


def repacked(content, compression=zipfile.ZIP_STORED):
    """torch's archive with another pickle in it."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(TORCH)) as source, zipfile.ZipFile(target, "w", compression) as archive:
        for name in source.namelist():
            archive.writestr(name, content if name.endswith("data.pkl") else source.read(name))
    return target.getvalue()


with zipfile.ZipFile(io.BytesIO(TORCH)) as _archive:
    DATA_PKL = next(_archive.read(name) for name in _archive.namelist() if name.endswith("data.pkl"))
pickles = st.one_of(
    bytes_changed(PICKLE), bytes_changed(TORCH), bytes_changed(DATA_PKL).map(repacked), st.sampled_from(HOSTILE),
    st.sampled_from(HOSTILE).map(repacked), st.sampled_from(HOSTILE).flatmap(bytes_changed),
    st.just(repacked(b"\x80\x02" + b"N0" * 100_000 + b"N.", zipfile.ZIP_DEFLATED)),
    st.integers(1, 200_000).map(lambda n: b"\x80\x04" + b"]" * n + b"." ),
    st.integers(1, 100_000).map(lambda n: b"\x80\x04}\x8c\x01a" + b"]" * n + b"a" * (n - 1) + b"s."),
)  # fmt: skip


def read_pickle(folder):
    path = folder / "backbone.pkl"
    read_all(open_file(path), folder)
    if not path.read_bytes().startswith(b"PK"):
        read_config(path) if "config" in open_pickle_file(path)[1] else None


PARAMS = {"dim": 4, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "vocab_size": 6, "multiple_of": 2, "rope_theta": 1e4}
_shapes = {"attention.wq": (4, 4), "attention.wk": (4, 4), "attention.wv": (4, 4), "attention.wo": (4, 4)}
_shapes |= {"feed_forward.w1": (10, 4), "feed_forward.w2": (4, 10), "feed_forward.w3": (10, 4)}
_shapes |= {"attention_norm": (4,), "ffn_norm": (4,)}
_tensors = {meta.layer_name(0, name): np.ones(shape, np.float32) for name, shape in _shapes.items()}
_tensors |= {meta.EMBEDDING: np.ones((6, 4), np.float32), meta.NORM: np.ones(4, np.float32)}
_tensors |= {meta.OUTPUT: np.ones((6, 4), np.float32)}
META_FILE = "consolidated.00.pth"
META = of_writer(write_torch, "consolidated.00.pth", tensors=_tensors)


def read_params(folder):
    read_all(dict(open_tensors(folder)), folder)
    read_config(folder)


BACKBONES = {
    "config": CONFIG,
    "weights": Kind(one("model.safetensors", safetensors), read_weights),
    "index": Kind(
        one("model.safetensors.index.json", files([INDEX])).map(lambda found: {**found, "a.safetensors": SAFETENSORS}),
        read_index,
    ),
    "params": Kind(one("params.json", files([PARAMS])).map(lambda found: {**found, META_FILE: META}), read_params),
    "pickle": Kind(one("backbone.pkl", pickles), read_pickle),
}
