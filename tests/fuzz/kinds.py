"""The kinds of files that come from outside: valid ones, inputs near them, and the readers that users meet.

A reader gets a folder and checks of what it accepts that it is what the project's code relies on.
"""

import gzip
import json

from hypothesis import strategies as st

from bench.record.calibration import Calibration
from bench.record.schema import Record
from decoding.options import parse_tree
from decoding.tree import Tree
from heads import checkpoint
from runtime.files.documents import plain, read_yaml
from runtime.options import check_options
from runtime.records import OtherKindError
from tests.fuzz.backbones import BACKBONES, ROOT
from tests.fuzz.inputs import FLOATS, NUMBERS, TEXTS, Kind, bytes_changed, changed, files, one, written
from trainer.config import TrainConfig, _set
from trainer.data.conversations import load_conversations
from trainer.data.prompts import read_prompts
from trainer.report.record import TrainRecord
from trainer.state import newest_state
from trainer.sweep.space import check_keys

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
    **BACKBONES,
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
