"""The backbone's likeliest next tokens over a corpus, in files that a trainer maps into memory.

A folder holds 00000.safetensors, 00001.safetensors, ..., the conversations in the order of the corpus, end to end:

    token_ids      (tokens,) int32, as the tokenizer's ``encode_with_mask`` gives them
    offsets        (conversations + 1,) int64: number i occupies token_ids[offsets[i]:offsets[i + 1]]
    ids            (tokens, k) int32, the likeliest tokens to follow token_ids[:r + 1] of the conversation, likeliest
                   first
    probabilities  (tokens, k) float16, theirs at temperature 1 over the whole vocabulary: a row adds up to less than 1

The metadata's ``top_k`` is a JSON object that names the backbone, how its weights are kept, the tokenizer and k.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ops.kernel import on_cpu
from ops.row_plan import RowPlan
from ops.select import top_k_log_probabilities
from runtime import jt
from runtime.interrupt import check_interrupt

LOGIT_BYTES, CUDA_LOGIT_BYTES = 32 << 20, 128 << 20  # of the logits that exist at a time; a GPU wants larger products
PASS_TOKENS = 4096  # of a forced pass
SHARD_TOKENS = 1 << 18  # 51 MB a file with 32 tokens a row; a run that is killed computes at most one file again
SHARD_NAME = re.compile(r"\d{5,}\.safetensors")
KEY = "top_k"
# safetensors writes several keys of metadata in an order that changes from process to process: there is one.


def top_k_folder(out: Path) -> Path:
    """Where the files of a corpus lie."""
    return out.with_name(f"{out.name}.top")


def likeliest(backbone, hidden, k: int):
    """The k likeliest next tokens of each row, likeliest first, without gradient.

    hidden: (rows, dim) float32, after the final norm. Returns ids (rows, k) int32 and their log probabilities under
    the softmax over the whole vocabulary, (rows, k) float32.
    """
    rows, vocab_size = hidden.shape[0], backbone.config.vocab_size
    pieces = -(-rows * vocab_size * 4 // (LOGIT_BYTES if on_cpu() else CUDA_LOGIT_BYTES))
    edges = np.linspace(0, rows, min(pieces, rows) + 1).astype(int).tolist()
    found = []
    with jt.no_grad():
        for first, last in itertools.pairwise(edges):
            logits = jt.nn.matmul_transpose(hidden[first:last], backbone.lm_head_weight)
            log_probabilities, ids = top_k_log_probabilities(logits, k)
            jt.sync([log_probabilities, ids])  # or the logits of all pieces would exist at once
            found.append((ids, log_probabilities))
    return found[0] if len(found) == 1 else tuple(jt.concat(list(parts), 0) for parts in zip(*found, strict=True))


# Writing -------------------------------------------------------------------------------------------------------------


def token_hash(token_ids: np.ndarray) -> str:
    """Names a sequence of tokens. token_ids: (tokens,) int32."""
    return hashlib.blake2b(np.ascontiguousarray(token_ids, "<i4").tobytes(), digest_size=16).hexdigest()


class TopKWriter:
    """Writes the files of a corpus, one whenever enough conversations have come.

    What a file holds is computed in one forced pass over its conversations, as the trainer tokenises them, so it
    depends on them alone. A file that is there already, whole and of the same tokens, is left as it is.
    """

    def __init__(self, backbone, tokenizer, k: int, folder: Path, place: Path):
        """folder: where they are written; place: where they come in the end. Raises ValueError when the vocabulary has
        less than k tokens and when something else is at the place."""
        if k > backbone.config.vocab_size:
            raise ValueError(
                f"--top-k-probabilities is {k}, expected at most the vocabulary's {backbone.config.vocab_size}"
            )
        others = [p.name for p in place.iterdir() if not SHARD_NAME.fullmatch(p.name)] if place.is_dir() else []
        if others or (place.exists() and not place.is_dir()):
            raise ValueError(f"{place} is not a folder of top-k files alone; move it, or choose another --out")
        self.backbone, self.tokenizer, self.k, self.folder, self.place = backbone, tokenizer, k, folder, place
        self.num_files = self._waiting_tokens = 0
        self._waiting: list[Sequence[dict[str, str]]] = []
        folder.mkdir(exist_ok=True)

    def add(self, messages: Sequence[dict[str, str]], num_tokens: int) -> None:
        """The next conversation of the corpus, and how many tokens it has."""
        self._waiting.append(messages)
        self._waiting_tokens += num_tokens
        if self._waiting_tokens >= SHARD_TOKENS:
            self._flush()

    def finish(self) -> None:
        """Write what is left, and delete files behind the last that an earlier, longer run wrote."""
        if self._waiting:
            self._flush()
        written = {self._path(number) for number in range(self.num_files)}
        for path in set(self.folder.iterdir()) - written:
            path.unlink()

    def publish(self) -> None:
        """Move the folder to its place; what an earlier run left there goes."""
        retired = self.folder.with_name("replaced")
        if self.place.exists():
            shutil.rmtree(retired, ignore_errors=True)
            os.rename(self.place, retired)
        os.rename(self.folder, self.place)
        shutil.rmtree(retired, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def _flush(self) -> None:
        # A text longer than the backbone's positions (it was written token by token, and may be spelled with more) has
        # no distribution behind them.
        most = self.backbone.config.max_positions
        encoded = self.tokenizer.encode_many_with_mask(self._waiting)
        texts = [np.array(ids[:most], np.int32) for ids, _ in encoded]
        token_ids = np.concatenate(texts)
        about = {
            "k": self.k,
            "backbone": self.backbone.fingerprint,
            "weights": self.backbone.storage,
            "tokenizer": self.tokenizer.fingerprint,
            "tokens": token_hash(token_ids),
        }
        path = self._path(self.num_files)
        if not path.exists() or _about(path) != about:
            offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
            tensors = {"token_ids": token_ids, "offsets": offsets, **self._forced(token_ids, offsets)}
            # Not save_file, which lets nobody but the owner read what it writes.
            path.with_suffix(".partial").write_bytes(save(tensors, {KEY: json.dumps(about)}))
            os.replace(path.with_suffix(".partial"), path)
        self.num_files += 1
        self._waiting, self._waiting_tokens = [], 0

    def _forced(self, token_ids: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
        """ids and probabilities of every token, (tokens, k) each, in passes of whole conversations."""
        ids = np.empty((len(token_ids), self.k), np.int32)
        probabilities = np.empty((len(token_ids), self.k), np.float16)
        first, count = 0, len(offsets) - 1
        while first < count:
            last = first + 1
            while last < count and offsets[last + 1] - offsets[first] <= PASS_TOKENS:
                last += 1
            rows = slice(int(offsets[first]), int(offsets[last]))
            plan = RowPlan.sequences(np.diff(offsets[first : last + 1]))
            hidden = self.backbone.forward(token_ids[None, rows], attend=plan, logits=None).hidden
            found = likeliest(self.backbone, hidden.reshape(-1, hidden.shape[-1]), self.k)
            ids[rows], probabilities[rows] = found[0].numpy(), np.exp(found[1].numpy())
            check_interrupt()
            first = last
        return {"ids": ids, "probabilities": probabilities}


# Reading -------------------------------------------------------------------------------------------------------------


def _about(path: Path) -> dict | None:
    """What a file says of itself; None for one that is not ours or not whole."""
    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, ValueError):
        return None


class Shard:
    """One file, mapped into memory. token_ids, ids and probabilities give NumPy arrays of the rows they are sliced
    with; offsets (conversations + 1,) int64; about: its metadata."""

    def __init__(self, path: Path):
        """Raises ValueError naming the file when it is damaged or something else."""
        self.path, self.about = path, _about(path)
        if not isinstance(self.about, dict) or not {"k", "backbone"} <= set(self.about):
            raise ValueError(f"{path} holds no top-k probabilities, or not whole; expected a file of corpus.write")
        try:
            file = safe_open(path, framework="numpy")
            self.token_ids, self.ids, self.probabilities = (
                file.get_slice(name) for name in ("token_ids", "ids", "probabilities")
            )
            self.offsets = file.get_tensor("offsets")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        rows, wide = [int(self.offsets[-1])], [int(self.offsets[-1]), self.about["k"]]
        shapes = [part.get_shape() for part in (self.token_ids, self.ids, self.probabilities)]
        if shapes != [rows, wide, wide]:
            raise ValueError(f"{path} is damaged: its parts have the shapes {shapes}, expected {[rows, wide, wide]}")


def open_shards(path: Path) -> list[Shard]:
    """The files of a folder, in order, or one file. Raises ValueError when there are none, or when they do not belong
    together."""
    if path.is_dir():
        paths = sorted((p for p in path.iterdir() if SHARD_NAME.fullmatch(p.name)), key=lambda p: int(p.stem))
    else:
        paths = [path] if path.is_file() else []
    if not paths:
        hint = f"; did you mean {top_k_folder(path)}?" if top_k_folder(path).is_dir() else ""
        raise ValueError(f"{path} holds no top-k files; expected the folder that corpus.write wrote{hint}")
    shards = [Shard(each) for each in paths]
    names = ("k", "backbone", "weights", "tokenizer")
    for shard in shards[1:]:
        differing = [name for name in names if shard.about.get(name) != shards[0].about.get(name)]
        if differing:
            raise ValueError(f"{shard.path} and {shards[0].path} differ in {', '.join(differing)}; write them again")
    return shards
