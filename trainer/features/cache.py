"""The backbone's features of the training text: computed at every step, or read from a cache that is written once."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from heads.base import Features
from ops.kernel import on_cpu
from ops.row_plan import RowPlan
from runtime import jt
from runtime.files.documents import identity
from runtime.interrupt import check_interrupt, deferred_interrupts
from runtime.types import Var
from trainer.data.tokens import TokenizedData
from trainer.features.shards import FORMAT, Shard, ShardStore, ShardWriter, cut

# Of a pass while the cache is written. Larger ones are no faster: Jittor holds Python's lock through a pass, so the
# writing thread runs between them (8192 took 1.07 times as long on the embedded backbone, two cores).
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

    def _read(self, name: str, indices: Sequence[int], num_tokens: int) -> Var:
        # A GPU gets half the bytes and widens them itself; on the CPU NumPy is faster at it than Jittor.
        rows = np.empty((1, num_tokens, self.store.dim), np.float32 if on_cpu() else np.float16)
        self.store.read(name, indices, rows[0])
        return jt.array(rows).float32()


# The cache -----------------------------------------------------------------------------------------------------------


def array_names(layers: Sequence[int]) -> list[str]:
    """The arrays of a feature cache: the last hidden state, then one for each layer."""
    return ["hidden", *(f"layer{i}" for i in layers)]


def cache_key(backbone, tokenizer_fingerprint: str, data: TokenizedData) -> str:
    """Names a cache by all it depends on: format, backbone and its storage, tokenizer and template, the tokens."""
    digest = hashlib.sha256()
    digest.update(identity([FORMAT, backbone.fingerprint, backbone.storage, tokenizer_fingerprint]).encode())
    digest.update(data.token_ids.tobytes())
    digest.update(data.offsets.tobytes())
    return digest.hexdigest()[:24]


def feature_store(backbone, tokenizer_fingerprint: str, data: TokenizedData, root: Path) -> ShardStore:
    """The store of this data's features, written or not. Raises ValueError when its directory holds something else."""
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
    """The feature cache of this data, after writing the wanted layers that it does not hold yet.

    Heads share it: each adds the layers that none before it needed. An interrupted writer loses its unfinished shards,
    and the next call writes the rest. Each rank writes its share, then all wait at ``barrier`` and open the cache.
    on_start(path, bytes) is called before anything is written, on_tokens(count) during the writing, ``offsets[-1]``
    tokens in all. Raises ValueError naming the file when a shard is damaged, a number is outside float16, or the disk
    has too little room.
    """
    store, names = feature_store(backbone, tokenizer_fingerprint, data, root), array_names(layers)
    known = store.present(names)
    store.verify(known)  # before hours of writing, not after
    written, done = write_features(backbone, data, store, layers, on_start, on_tokens, rank, world_size)
    barrier()
    missing = [shard for shard in store.all(names) if not store.is_complete(shard)]
    if missing:
        raise ValueError(
            f"{store.path(missing[0])} and {len(missing) - 1} other shards are missing although all {world_size} ranks "
            "have written theirs; start again to write them"
        )
    store.verify(store.present(names) - known - written)
    on_tokens(int(data.offsets[-1]) - done)
    return CachedFeatures(store, data, layers)


def write_features(
    backbone,
    data: TokenizedData,
    store: ShardStore,
    layers: tuple[int, ...],
    on_start: Callable[[Path, int], None],
    on_tokens: Callable[[int], None],
    rank: int,
    world_size: int,
) -> tuple[set[Shard], int]:
    """Write this rank's share of the missing shards of these layers: those whose number is ``rank`` modulo the ranks.

    Returns (the shards written, the tokens reported to ``on_tokens``). Raises as ``open_cache`` does.
    """
    names = array_names(layers)
    missing = set(store.all(names)) - store.present(names)
    if not missing:
        return set(), 0
    root, num_bytes = store.directory.parent, store.num_bytes(missing)
    on_start(store.directory, num_bytes)
    root.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(root).free) < num_bytes * 1.05:
        raise ValueError(
            f"the feature cache takes {num_bytes / 1e9:.2f} GB, {root} has {free / 1e9:.2f} GB free; "
            "use --features online or another --cache-dir"
        )
    store.prepare()
    todo = sorted({index for _, index in missing})
    done = sum(map(store.num_rows, set(range(store.num_shards)) - set(todo)))
    on_tokens(done)
    with deferred_interrupts(), ShardWriter(store) as writer:
        for index in (index for index in todo if index % world_size == rank):
            # Checked again: another process may be writing the same cache.
            wanted = [name for name in names if not store.is_complete((name, index))]
            layers_wanted = tuple(i for i, name in zip(layers, names[1:], strict=True) if name in wanted)
            shard = store.sequences(index)
            edges = cut(data.offsets[shard.start : shard.stop + 1], CHUNK_TOKENS)
            for first, last in itertools.pairwise(edges) if wanted else ():
                chunk = shard[first:last]
                features = backbone_features(backbone, data, chunk, layers_wanted)
                parts = {"hidden": features.hidden, **{f"layer{i}": each for i, each in features.layers.items()}}
                arrays = jt.fetch_sync([parts[name] for name in wanted])
                writer.put(index, {name: rows[0] for name, rows in zip(wanted, arrays, strict=True)}, chunk[0])
                on_tokens(sum(features.lengths))
                done += sum(features.lengths)
                check_interrupt()
    return writer.written, done
