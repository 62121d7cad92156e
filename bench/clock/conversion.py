"""What converting a large backbone takes, for ``bench/conversion.py``: seconds and peak memory of each step, in a
separate process."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from backbone.config import CONFIG, BackboneConfig, parse_config
from backbone.files.layout import BIN, META, PICKLE, SAFETENSORS, SINGLE
from backbone.files.lazy import LazyTensor
from backbone.files.meta import feed_forward_size
from backbone.formats import open_source
from backbone.formats.containers import write_torch
from backbone.formats.shards import parse_size, plan_shards
from backbone.weights import expected_shapes
from bench.record.files import ROOT
from bench.tables.terminal import note
from runtime.atomic import check_writable
from runtime.files.documents import parse_json, write_json
from runtime.options import option

STEPS = (SAFETENSORS, META, PICKLE)
# (least bytes, hidden_size, vocab_size): as wide as a 7B, as a 1B, and narrow.
WIDTHS = ((4_000_000_000, 4096, 32000), (400_000_000, 2048, 32000), (0, 256, 4096))
HEAD_DIM, HEADS_PER_KEY = 64, 4
# A process inherits the peak of the one that started it, so this small one starts the conversion.
LAUNCHER = """
import json, resource, subprocess, sys, time
begin = time.monotonic()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(json.dumps([status, time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


@dataclass
class ConversionOptions:
    """The options of bench/conversion.py."""

    scratch: str | None = option(None, "an existing folder on the disk to measure (required)", metavar="DIR")
    size: str = option("2GB", "of the model's weights")
    shard_size: str = option("500MB", "of a weight file", metavar="SIZE")
    out: str | None = option(None, "write the JSON here too", metavar="FILE")

    def check(self) -> None:
        """Raises ValueError without a folder, and OSError for an ``out`` that cannot be written."""
        if not self.scratch or not Path(self.scratch).is_dir():
            raise ValueError(f"--scratch {self.scratch or 'DIR'} is not a folder; name an existing one")
        if self.out:
            check_writable(self.out)


def model_config(size: int) -> dict:
    """config.json of a float16 Llama of about ``size`` bytes, which determines its depth; two layers at least."""
    hidden, vocab = next((hidden, vocab) for least, hidden, vocab in WIDTHS if size >= least)
    heads = hidden // HEAD_DIM
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": feed_forward_size(hidden, 256, None),
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // HEADS_PER_KEY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 4096,
        "torch_dtype": "float16",
    }
    shapes = expected_shapes(parse_config(config))
    layer = sum(2 * np.prod(shape) for name, shape in shapes.items() if ".layers." in name)
    rest = sum(2 * np.prod(shape) for name, shape in shapes.items() if ".layers." not in name)
    return config | {"num_hidden_layers": max(2, round((size - rest) / layer))}


def random_tensor(seed: int, shape: tuple[int, ...]) -> LazyTensor:
    """float16 numbers that are drawn when they are read."""
    generator = np.random.default_rng(seed)

    def read_rows(start: int, stop: int) -> np.ndarray:
        drawn = generator.standard_normal((stop - start, *shape[1:]), dtype=np.float32)
        return (drawn * np.float32(0.02)).astype(np.float16)

    return LazyTensor(np.dtype(np.float16), shape, read_rows)


def make_model(folder: Path, raw: dict, shard_size: int) -> None:
    """The random model as sharded pytorch_model files."""
    folder.mkdir()
    config: BackboneConfig = parse_config(raw)
    shapes = expected_shapes(config).items()
    tensors = {name: random_tensor(seed, shape) for seed, (name, shape) in enumerate(shapes)}
    plan = plan_shards(tensors, SINGLE[BIN], shard_size)
    for file, names in plan.items():
        write_torch(folder / file, {name: tensors[name] for name in names})
    weight_map = {name: file for file, names in plan.items() for name in names}
    write_json(folder / f"{SINGLE[BIN]}.index.json", {"weight_map": weight_map})
    write_json(folder / CONFIG, raw)


def digest(path: Path) -> str:
    """sha256 over every tensor's bits, by name."""
    total = hashlib.sha256()
    for name, tensor in open_source(path).tensors.items():
        total.update(name.encode())
        for block in tensor.blocks():
            total.update(block.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def convert_in_child(source: Path, to: str, out: Path, shard_size: str) -> dict:
    """One conversion by the entry in a separate process. Raises ValueError if it fails."""
    words = ["weight_convert.py", source, "--to", to, "--out", out, "--shard-size", shard_size]
    command = [sys.executable, "-S", "-c", LAUNCHER, sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"converting to {to} did not start")
    status, seconds, kilobytes = parse_json(done.stdout.splitlines()[-1], "the measured process")
    if status:
        raise ValueError(f"converting to {to} ended with status {status}; see the reason above")
    return {"to": to, "seconds": round(seconds, 2), "peak_bytes": kilobytes * 1024}


def measure(options: ConversionOptions) -> dict[str, Any]:
    """The record of the conversions, JSON-ready."""
    raw = model_config(parse_size(options.size))
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="conversion-") as scratch:
        source, steps = Path(scratch) / BIN, []
        make_model(source, raw, parse_size(options.shard_size))
        size = sum(tensor.nbytes for tensor in open_source(source).tensors.values())
        before = digest(source)
        for to in STEPS:
            out = Path(scratch) / (f"{to}.pkl" if to == PICKLE else to)
            steps.append({"from": open_source(source).layout, **convert_in_child(source, to, out, options.shard_size)})
            note(str(steps[-1]))
            shutil.rmtree(source)
            source = out
        identical = digest(source) == before
    return {
        "schema_version": 1,
        "kind": "conversion",
        "model_bytes": size,
        "layers": raw["num_hidden_layers"],
        "shard_size": options.shard_size,
        "steps": steps,
        "identical": identical,
        "provenance": runtime.provenance(0),
    }
