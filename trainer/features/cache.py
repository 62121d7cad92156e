"""The backbone's features of the training text: computed at every step, or read from a cache written once.

    python -m trainer.features --data FILE... --heads NAME...

writes the cache for all layers that these heads ask for (default: every head), which the runs that follow then share;
with --verify it checks the cache that is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from backbone.engines import load_engine
from heads.base import Features
from heads.registry import available, build, head_class
from ops.kernel import on_cpu
from ops.row_plan import RowPlan
from runtime import jt
from runtime.entry import Parser, run_entry
from runtime.interrupt import check_interrupt, deferred_interrupts
from trainer.config import FIELDS, TYPES, TrainConfig
from trainer.data.splits import load_splits
from trainer.data.tokens import TokenizedData
from trainer.features.shards import FORMAT, Shard, ShardStore, ShardWriter
from trainer.report.watch import Watch

# Of a pass while the cache is written. Larger ones are no faster: Jittor keeps Python's lock through a pass, so the
# writing thread gets its turns between them (8192 took 1.07 times as long on the embedded backbone, two cores).
CHUNK_TOKENS = 2048


def backbone_features(backbone, data: TokenizedData, indices: Sequence[int], layers: tuple[int, ...]) -> Features:
    """Features of some conversations laid end to end: hidden (1, tokens, dim) and the layers asked for."""
    lengths = data.lengths[list(indices)]
    tokens = np.concatenate([data.conversation(i)[0] for i in indices])
    output = backbone.forward(tokens[None], attend=RowPlan.sequences(lengths), layers=layers, logits=None)
    return Features(output.hidden, output.layers, tuple(int(n) for n in lengths))


class OnlineFeatures:
    """Runs the backbone at every step: nothing on disk."""

    def __init__(self, backbone, data: TokenizedData, layers: tuple[int, ...]):
        self.backbone, self.data, self.layers = backbone, data, layers

    def __call__(self, indices: Sequence[int]) -> Features:
        features = backbone_features(self.backbone, self.data, indices, self.layers)
        features.hidden.sync()
        return features


class CachedFeatures:
    """Reads features from the memory-mapped shards of a cache: float32 of what was rounded to float16."""

    def __init__(self, store: ShardStore, data: TokenizedData, layers: tuple[int, ...]):
        self.store, self.data, self.layers = store, data, layers

    def __call__(self, indices: Sequence[int]) -> Features:
        lengths = tuple(int(n) for n in self.data.lengths[list(indices)])
        hidden, *layers = (self._read(name, indices, sum(lengths)) for name in array_names(self.layers))
        return Features(hidden, dict(zip(self.layers, layers, strict=True)), lengths)

    def _read(self, name: str, indices: Sequence[int], num_tokens: int):
        # A GPU gets half the bytes and widens them itself; on the CPU NumPy is faster at it than Jittor.
        rows = np.empty((1, num_tokens, self.store.dim), np.float32 if on_cpu() else np.float16)
        self.store.read(name, indices, rows[0])
        return jt.array(rows).float32()


# The cache -----------------------------------------------------------------------------------------------------------


def array_names(layers: Sequence[int]) -> list[str]:
    """The arrays of a feature cache: the last hidden state, then one for each layer."""
    return ["hidden", *(f"layer{i}" for i in layers)]


def cache_key(backbone, tokenizer_fingerprint: str, data: TokenizedData) -> str:
    """Names a cache by all it depends on: format, backbone and how it is kept, tokenizer and template, the tokens."""
    digest = hashlib.sha256()
    digest.update(json.dumps([FORMAT, backbone.fingerprint, backbone.storage, tokenizer_fingerprint]).encode())
    digest.update(data.token_ids.tobytes())
    digest.update(data.offsets.tobytes())
    return digest.hexdigest()[:24]


def feature_store(backbone, tokenizer_fingerprint: str, data: TokenizedData, root: Path) -> ShardStore:
    """Where the features of this data lie, or will. Raises ValueError when something else lies there."""
    identity = {
        "backbone": {"fingerprint": backbone.fingerprint, "storage": backbone.storage},
        "tokenizer": tokenizer_fingerprint,
        "tokens": int(data.offsets[-1]),
        "token_ids_sha256": hashlib.sha256(data.token_ids.tobytes()).hexdigest(),
        "offsets_sha256": hashlib.sha256(data.offsets.tobytes()).hexdigest(),
    }
    directory = Path(root) / cache_key(backbone, tokenizer_fingerprint, data)
    return ShardStore(directory, identity, data.offsets, backbone.config.hidden_size)


def open_cache(
    backbone,
    tokenizer_fingerprint: str,
    data: TokenizedData,
    layers: tuple[int, ...],
    root: Path,
    on_start: Callable[[Path, int], None] = lambda path, num_bytes: None,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> CachedFeatures:
    """The feature cache of this data; what it lacks of the wanted layers is written now.

    Heads share it: each adds the layers that none before it asked for. An interrupted writer loses the shards in
    flight, and the next call goes on behind the whole ones. Of several ranks each writes its share, then all wait at
    ``barrier`` and open the whole. on_start(path, bytes) is called before anything is written, on_tokens(count) as it
    goes, ``offsets[-1]`` tokens in all. Raises ValueError naming the file when a shard is damaged, a number is outside
    float16, or the disk lacks the room.
    """
    store, names = feature_store(backbone, tokenizer_fingerprint, data, root), array_names(layers)
    known = store.present(names)
    store.verify(known)  # before hours of writing, not after them
    written, done = write_features(backbone, data, store, layers, on_start, on_tokens, rank, world_size)
    barrier()
    lacking = [shard for shard in store.all(names) if not store.is_there(shard)]
    if lacking:
        raise ValueError(
            f"{store.path(lacking[0])} and {len(lacking) - 1} other shards are lacking after all {world_size} ranks "
            "were to write theirs; start again to go on from what is there"
        )
    store.verify(store.present(names) - known - written)
    on_tokens(int(data.offsets[-1]) - done)
    return CachedFeatures(store, data, layers)


def write_features(
    backbone,
    data: TokenizedData,
    store: ShardStore,
    layers: tuple[int, ...],
    on_start: Callable[[Path, int], None] = lambda path, num_bytes: None,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[set[Shard], int]:
    """Write what the store lacks of these layers and is this rank's: shards whose number is ``rank`` modulo the ranks.

    Returns (the shards written, the tokens told to ``on_tokens``). Raises as ``open_cache`` does.
    """
    names = array_names(layers)
    lacking = set(store.all(names)) - store.present(names)
    if not lacking:
        return set(), 0
    on_start(store.directory, store.num_bytes(lacking))
    _check_room(store.directory.parent, store.num_bytes(lacking))
    store.prepare()
    todo = sorted({index for _, index in lacking})
    done = sum(map(store.num_rows, set(range(store.num_shards)) - set(todo)))
    on_tokens(done)
    with deferred_interrupts(), ShardWriter(store) as writer:
        for index in (index for index in todo if index % world_size == rank):
            # Looked up again: another process may write the same cache, and be ahead.
            wanted = [name for name in names if not store.is_there((name, index))]
            layers_wanted = tuple(i for i, name in zip(layers, names[1:], strict=True) if name in wanted)
            for chunk in chunks(data, store.sequences(index), CHUNK_TOKENS) if wanted else ():
                features = backbone_features(backbone, data, chunk, layers_wanted)
                parts = {"hidden": features.hidden, **{f"layer{i}": each for i, each in features.layers.items()}}
                read = jt.fetch_sync([parts[name] for name in wanted])
                writer.put(index, {name: rows[0] for name, rows in zip(wanted, read, strict=True)}, chunk[0])
                on_tokens(sum(features.lengths))
                done += sum(features.lengths)
                check_interrupt()
    return writer.written, done


def chunks(data: TokenizedData, sequences: range, most: int) -> Iterator[range]:
    """A shard's sequences in stretches of at most ``most`` tokens; a longer one alone."""
    first = sequences.start
    for index in range(first + 1, sequences.stop):
        if data.offsets[index + 1] - data.offsets[first] > most:
            yield range(first, index)
            first = index
    yield range(first, sequences.stop)


def _check_room(root: Path, num_bytes: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < num_bytes * 1.05:
        raise ValueError(
            f"the feature cache takes {num_bytes / 1e9:.2f} GB, {root} has {free / 1e9:.2f} GB free; "
            "use --features online or another --cache-dir"
        )


# The command line ----------------------------------------------------------------------------------------------------

# The options of a training run that decide what its features are and where they lie.
OPTIONS = (
    *("backbone", "dtype", "load_in_8bit", "load_in_4bit", "backbone_engine", "template", "data", "data_weights"),
    *("block_size", "loss_on", "max_length", "held_out", "cache_dir"),
)


def layers_of(names: Sequence[str] | None, backbone) -> tuple[int, ...]:
    """The layers that any of these heads asks for with its default options; None: every head that can be built and has
    something to train. Raises ValueError for a name that cannot be used."""
    layers = set()
    for name in available() if names is None else names:
        try:
            if head_class(name).trained:
                layers.update(build(name, {}, backbone).layers)
        except ValueError as error:
            if names is not None:
                raise
            print(f"left out {name}: {' '.join(str(error).split())}", file=sys.stderr)
    return tuple(sorted(layers))


def verify_cache(store: ShardStore, names: Sequence[str]) -> None:
    """Check every shard of these arrays. Raises ValueError when some are damaged or lacking."""
    present = store.present(names)
    store.verify(present)
    lacking = [store.path(shard) for shard in store.all(names) if shard not in present]
    if lacking:
        raise ValueError(
            f"{lacking[0]} and {len(lacking) - 1} other shards are lacking, the {len(present)} others are sound; run "
            "without --verify to write what lacks"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for a mistake of the user's."""
    return run_entry(_run, arguments)


def _options(arguments: Sequence[str]):
    """(the options as a TrainConfig, names of heads or None, whether only to check)."""
    parser = Parser(prog="python -m trainer.features", description="Write or check the cache of backbone features.")
    for name in OPTIONS:
        flag, text, wanted = f"--{name.replace('_', '-')}", FIELDS[name].metadata["help"], TYPES[name]
        default = getattr(TrainConfig, name, [])
        if wanted is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif wanted in (list[str], list[float]):
            [kind] = wanted.__args__
            parser.add_argument(flag, nargs="+", type=kind, default=default, metavar=name.upper(), help=text)
        else:
            kind, shown = int if wanted is int else str, "" if default is None else f" (default: {default})"
            parser.add_argument(flag, type=kind, default=default, metavar=name.upper(), help=text + shown)
    parser.add_argument("--heads", nargs="+", metavar="NAME", help="whose layers to write (default: every head's)")
    parser.add_argument("--verify", action="store_true", help="check the cache that is there and write nothing")
    options = parser.parse_args(arguments)
    return TrainConfig(**{name: getattr(options, name) for name in OPTIONS}), options.heads, options.verify


def _run(arguments: Sequence[str]) -> None:
    config, heads, only_verify = _options(arguments)
    for name in heads or ():
        head_class(name)  # an unknown head is answered before anything is loaded
    splits = load_splits(config)
    kept = config.load_in_8bit, config.load_in_4bit
    backbone = load_engine(config.backbone_engine, config.backbone, config.dtype, *kept)
    layers = layers_of(heads, backbone)
    names, parts = array_names(layers), []
    with Watch(0) as watch:
        for part, data in (("training", splits.training), ("held out", splits.held_out)):
            started = time.perf_counter()
            store = feature_store(backbone, splits.tokenizer.fingerprint, data, Path(config.cache_dir))
            if only_verify:
                verify_cache(store, names)
            else:
                start, advance = watch.cache(data)
                open_cache(backbone, splits.tokenizer.fingerprint, data, layers, Path(config.cache_dir), start, advance)
            num_bytes = store.num_bytes(store.all(names))
            seconds = round(time.perf_counter() - started, 2)
            said = {"path": str(store.directory), "shards": store.num_shards, "bytes": num_bytes, "seconds": seconds}
            parts.append({"part": part, "sequences": len(data), "tokens": int(data.offsets[-1]), **said})
    print(json.dumps({"status": "verified" if only_verify else "written", "arrays": names, "parts": parts}))
