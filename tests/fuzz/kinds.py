"""The kinds of files that come from outside: valid ones, inputs near them, and the readers that users meet.

A reader gets a folder and checks of what it accepts that it is what the project's code relies on.
"""

import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from backbone.config import read_config
from backbone.files import meta
from backbone.files.lazy import in_memory
from backbone.files.pickle_file import open_pickle_file
from backbone.formats.containers import write_pickle, write_safetensors, write_torch
from backbone.weights import expected_shapes, open_file, open_tensors
from bench.record.calibration import Calibration
from bench.record.schema import Record
from decoding.options import parse_tree
from decoding.tree import Tree
from heads import checkpoint
from runtime.files.documents import plain, read_yaml
from runtime.options import check_options
from runtime.records import OtherKindError
from tests.fuzz.inputs import FLOATS, NUMBERS, TEXTS, bytes_changed, changed, files, values, written
from trainer.config import TrainConfig, _set
from trainer.data.conversations import load_conversations
from trainer.data.prompts import read_prompts
from trainer.report.record import TrainRecord
from trainer.state import newest_state
from trainer.sweep.space import check_keys

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Kind:
    """contents: a strategy of {file name: bytes}; read(folder): the reader and its checks."""

    contents: st.SearchStrategy
    read: Callable[[Path], object]


def one(name, strategy):
    """Contents of a single file."""
    return strategy.map(lambda content: {name: content})


# Backbones -----------------------------------------------------------------------------------------------------------

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


# Options -------------------------------------------------------------------------------------------------------------

counts = ("0", "4", "2047", "2048", "9" * 9, "9" * 5000, "-1", "\u00b2", "1e3", "")
chains = st.one_of(st.sampled_from(counts), st.text(max_size=4))


def read_tree(folder):
    path = folder / "tree.json"
    tree = parse_tree(str(path))
    assert isinstance(tree, Tree) and sorted(tree.paths) == sorted(json.loads(path.read_text("utf-8-sig")))


def read_chain(folder):
    text = f"chain:{(folder / 'chain').read_text()}"
    try:
        assert parse_tree(text).is_chain
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error  # no file is concerned


SPACE = b"""
learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
tokens_per_step: {low: 1024, high: 4096, step: 1024}
optimizer: {choices: [adamw, lion]}
head.num_layers: {choices: [1, 2]}
"""
RUN = b"head: mlp\nepochs: 2\ndata: [a.jsonl]\nlearning-rate: 1.0e-3\nhead.num_layers: 2\nfeatures: online\nseed: 0\n"
yaml_scalars = st.one_of(
    st.sampled_from([str(number) for number in (*NUMBERS, *FLOATS)]), st.sampled_from(TEXTS), st.text(max_size=6),
    st.sampled_from((
        "1" + "0" * 400, "1e-320", "1.0e-320", ".nan", "-.inf", "1:30:00", "0x" + "f" * 300, "2024-99-99", "!!int x",
        "!!timestamp a", "!!binary x", "!!python/object/apply:os.system [true]", "*a", "&a [*a]", "<<", "!!set {a}",
        "!!omap [a: 1]", "yes", "~", "[" * 300, "[" * 100_000, "{low: 1, high: 2, step: 1.0e-320}",
        "{low: -1.7e308, high: 1.7e308}", "{choices: [1, 1]}", "{choices: [[]]}",
    )),
)  # fmt: skip


@st.composite
def yaml_changed(draw, valid):
    """YAML with the values of some keys replaced, in text."""
    words = valid.decode().split(" ")
    for _ in range(draw(st.integers(1, 3))):
        words[draw(st.integers(0, len(words) - 1))] = draw(yaml_scalars)
    return " ".join(words).encode("utf-8", "surrogatepass")


def bomb(levels, width):
    """Aliases of aliases."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines).encode()


bombs = st.builds(bomb, st.integers(1, 40), st.integers(1, 12))


def read_space(folder):
    entries = check_keys(read_yaml(folder / "space.yaml"), str(folder / "space.yaml"))
    assert all(isinstance(key, str) for key in entries)


def read_run(folder):
    path, config = folder / "run.yaml", TrainConfig()
    for key, value in read_yaml(path).items():
        _set(config, key, value, str(path))
    try:
        check_options(config)
        config.check_text()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error  # as on the command line, where the option is named


# Text ----------------------------------------------------------------------------------------------------------------

TURNS = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
MESSAGES = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
CHAT = [{"id": "a", "conversations": TURNS}, {"id": "b", "messages": MESSAGES}]
PROMPTS = [
    {"question_id": 1, "category": "chat", "turns": ["Hello?", "And?"]}, {"id": "a", "conversations": TURNS},
    {"task_id": "t", "prompt": "def f():"}, {"question": "1 + 1?", "answer": "2"},
]  # fmt: skip


def lines_of(records):
    """Records as JSON lines."""
    return b"\n".join(written(record) for record in records) if isinstance(records, list) else written(records)


def texts(records):
    """Files of records: lists, lines, cut, gzipped, or packed to a thousandth."""
    near = st.one_of(changed(records).map(written), changed(records).map(lines_of), bytes_changed(lines_of(records)))
    packed = st.one_of(
        near.map(lambda content: gzip.compress(content, 1)),
        near.flatmap(lambda content: bytes_changed(gzip.compress(content, 1))),
        st.just(GZIP_BOMB),
    )
    return st.one_of(near, near, packed)


GZIP_BOMB = gzip.compress(b" " * (1 << 24)) * 16 + gzip.compress(lines_of(PROMPTS))


def read_questions(folder):
    prompts = read_prompts(folder / "prompts.jsonl").prompts
    assert prompts and all(turn.strip() for prompt in prompts for turn in prompt.turns)


def read_training(folder):
    talks, report = load_conversations(folder / "chat.jsonl")
    assert talks and report.kept == len(talks) <= report.read
    for talk in talks:
        assert talk.messages[-1]["role"] == "assistant" and all(turn["content"].strip() for turn in talk.messages)
        "".join(turn["content"] for turn in talk.messages).encode()


# Our own files -------------------------------------------------------------------------------------------------------


def shortened(record):
    """A result with its first two prompts."""
    return {**record, "per_prompt": record["per_prompt"][:2]}


RESULT = shortened(json.loads((ROOT / "results" / "mlp.json").read_text()))
TRAINED = {
    "schema_version": 1, "kind": "train", "head": "mlp", "config": {"head": "mlp"}, "provenance": {"device": "cpu"},
    "data": {}, "parameters": 5, "steps": 20, "tokens": 100, "train_s": 2.0, "tokens_per_s": 50.0, "skipped_updates": 0,
    "best": {"step": 10, "expected_accept_length": 2.0, "top1": [0.5, None], "top5": [0.5, None], "loss": [2.0, None],
             "tree_nodes": 16, "checkpoint": "c", "weights_sha256": "beef"},
    "history": [{"step": 10, "expected_accept_length": 2.0, "loss": [2.0, None]}], "interrupted": False,
    "sessions": [{"first_step": 0, "last_step": 20, "provenance": {}}],
}  # fmt: skip


def read_result(folder):
    path = folder / "result.json"
    for kind in (Record, TrainRecord, Calibration):
        try:
            record = kind.read(path)
        except OtherKindError as error:
            refused = error
        else:
            assert kind.parse(plain(record), path) == record
            return
    raise refused


STATE = {
    "format": 1,
    "progress": {
        "step": 12, "tokens": 100, "skipped": 0, "skipped_in_row": 0, "best_step": 10, "train_s": 1.0,
        "history": TRAINED["history"], "sessions": TRAINED["sessions"],
        "best": {
            "expected_accept_length": 2.0, "top1": [0.5], "top5": [0.5], "loss": [2.0], "tree": [[0]], "stats": {}
        },
    },
    "identity": {"options": {"epochs": 1.0}, "head": "mlp"},
    "files": {},
}  # fmt: skip
FOLDERS = ("step-00000012", "step-\u00b2", "step-99999999", "step-1", "step--0000005", "step-00000012x")


def with_digest(document):
    """A file whose digest fits, whoever changed the rest."""
    content = written(document)
    try:
        document = json.loads(content)
        return json.dumps({**document, "digest": checkpoint.config_digest(document)}).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return content


@st.composite
def state_files(draw):
    names = st.one_of(st.just(FOLDERS[0]), st.sampled_from(FOLDERS))
    content = st.one_of(changed(STATE).map(with_digest), changed(STATE).map(with_digest), files([STATE]))
    return {f"states/{draw(names)}/state.json": draw(content)}


def read_state(folder):
    state = newest_state(folder)
    if state is not None:
        assert state.directory.name == f"step-{state.step:08d}" and state.meta["progress"]["best_step"] <= state.step


CHECKPOINT = {"head": "mlp", "head_config": {"num_depths": 2}, "backbone": {"fingerprint": "f"}, "files": {}}


def read_checkpoint(folder):
    config = checkpoint.read_config(folder)
    checkpoint.check_files(folder, config.get("files", {}))
    assert isinstance(config["head"], str) and isinstance(config["head_config"], dict)


KINDS = {
    "config": CONFIG,
    "weights": Kind(one("model.safetensors", safetensors), read_weights),
    "index": Kind(
        one("model.safetensors.index.json", files([INDEX])).map(lambda found: {**found, "a.safetensors": SAFETENSORS}),
        read_index,
    ),
    "params": Kind(one("params.json", files([PARAMS])).map(lambda found: {**found, META_FILE: META}), read_params),
    "pickle": Kind(one("backbone.pkl", pickles), read_pickle),
    "tree": Kind(one("tree.json", files([[[0], [1], [0, 0], [0, 1], [1, 0]]])), read_tree),
    "chain": Kind(one("chain", chains.map(lambda text: text.encode("utf-8", "replace"))), read_chain),
    "space": Kind(one("space.yaml", st.one_of(yaml_changed(SPACE), bytes_changed(SPACE), bombs)), read_space),
    "run": Kind(one("run.yaml", st.one_of(yaml_changed(RUN), bytes_changed(RUN), bombs)), read_run),
    "prompts": Kind(one("prompts.jsonl", texts(PROMPTS)), read_questions),
    "training text": Kind(one("chat.jsonl", texts(CHAT)), read_training),
    "result": Kind(one("result.json", files([RESULT, TRAINED], 1)), read_result),
    "state": Kind(state_files(), read_state),
    "checkpoint": Kind(
        one("config.json", st.one_of(changed(CHECKPOINT).map(with_digest), files([CHECKPOINT]))), read_checkpoint
    ),
}
