"""The backbone's most probable next tokens over a corpus, in files that a trainer maps into memory.

A folder holds 00000.safetensors, 00001.safetensors, ..., with the conversations of the corpus end to end, in order:

    token_ids      (tokens,) int32, as the tokenizer's ``encode_with_mask`` gives them
    offsets        (conversations + 1,) int64: number i occupies token_ids[offsets[i]:offsets[i + 1]]
    ids            (tokens, k) int32: row r holds the most probable tokens after token_ids[:r + 1] of the conversation,
                   the most probable first
    probabilities  (tokens, k) float16, theirs at temperature 1 over the whole vocabulary: a row adds up to less than 1

The metadata's ``top_k`` is a JSON object that names the backbone, its storage, the tokenizer and k.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ops.kernel import on_cpu
from ops.row_plan import RowPlan
from ops.select import top_k_log_probabilities
from runtime import jt
from runtime.atomic import atomic_directory, write_file
from runtime.files.documents import parse_json, to_json
from runtime.interrupt import check_interrupt
from runtime.types import Var
from trainer.features.shards import cut

LOGIT_BYTES, CUDA_LOGIT_BYTES = 32 << 20, 128 << 20  # of the logits that exist at a time; a GPU needs larger products
PASS_TOKENS = 4096  # of a forced pass
SHARD_TOKENS = 1 << 18  # 51 MB a file with 32 tokens a row; a run that is killed computes at most one file again
SHARD_NAME = re.compile(r"\d{5,}\.safetensors")
KEY = "top_k"
# One key of metadata, because safetensors writes several in an order that changes from process to process.


def top_k_folder(out: Path) -> Path:
    """The folder of a corpus's files."""
    return out.with_name(f"{out.name}.top")


def likeliest(backbone, hidden: Var, k: int) -> tuple[Var, Var]:
    """The k most probable next tokens of each row, the most probable first, without gradient.

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
    """Writes the files of a corpus, one whenever there are enough conversations.

    The content of a file is computed in teacher-forced passes over its conversations, as the trainer tokenizes them, so
    it depends on them alone. A complete file of the same tokens that already exists is reused.
    """

    def __init__(self, backbone, tokenizer, k: int, folder: Path, place: Path):
        """folder: where files are written; place: where they are published. Raises ValueError when the vocabulary has
        fewer than k tokens and when the place holds something else."""
        if k > backbone.config.vocab_size:
            raise ValueError(
                f"--top-k-probabilities is {k}, expected at most the vocabulary's {backbone.config.vocab_size}"
            )
        others = [p.name for p in place.iterdir() if not SHARD_NAME.fullmatch(p.name)] if place.is_dir() else []
        if others or (place.exists() and not place.is_dir()):
            raise ValueError(f"{place} is not a folder of only top-k files; move it, or choose another --out")
        self.backbone, self.tokenizer, self.k, self.folder, self.place = backbone, tokenizer, k, folder, place
        self.num_files = self._waiting_tokens = 0
        self._waiting: list[Sequence[dict[str, str]]] = []
        folder.mkdir(exist_ok=True)

    def add(self, messages: Sequence[dict[str, str]], num_tokens: int) -> None:
        """Add the next conversation of the corpus; num_tokens: its length."""
        self._waiting.append(messages)
        self._waiting_tokens += num_tokens
        if self._waiting_tokens >= SHARD_TOKENS:
            self._flush()

    def finish(self) -> None:
        """Write what is left, and delete later files of an earlier, longer run."""
        if self._waiting:
            self._flush()
        written = {self._path(number) for number in range(self.num_files)}
        for path in set(self.folder.iterdir()) - written:
            path.unlink()

    def publish(self) -> None:
        """Move the files to their place and remove those of an earlier run."""
        with atomic_directory(self.place) as partial:
            for path in self.folder.iterdir():
                os.rename(path, partial / path.name)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def _flush(self) -> None:
        # Tokenized again, a text may have more tokens than were generated, and more than the backbone has positions.
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
            # Not save_file, which makes files that only the owner can read.
            write_file(path, save(tensors, {KEY: to_json(about)}))
        self.num_files += 1
        self._waiting, self._waiting_tokens = [], 0

    def _forced(self, token_ids: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
        """ids and probabilities of every token, (tokens, k) each, in passes over complete conversations."""
        ids = np.empty((len(token_ids), self.k), np.int32)
        probabilities = np.empty((len(token_ids), self.k), np.float16)
        for first, last in itertools.pairwise(cut(offsets, PASS_TOKENS)):
            rows = slice(int(offsets[first]), int(offsets[last]))
            plan = RowPlan.sequences(np.diff(offsets[first : last + 1]))
            hidden = self.backbone.forward(token_ids[None, rows], attend=plan, logits=None).hidden
            found = likeliest(self.backbone, hidden.reshape(-1, hidden.shape[-1]), self.k)
            ids[rows], probabilities[rows] = found[0].numpy(), np.exp(found[1].numpy())
            check_interrupt()
        return {"ids": ids, "probabilities": probabilities}


# Reading -------------------------------------------------------------------------------------------------------------


def _about(path: Path) -> dict | None:
    """The metadata of a file; None for one that is damaged or something else."""
    try:
        with safe_open(path, framework="numpy") as file:
            return parse_json((file.metadata() or {}).get(KEY, "null"), path)
    except (SafetensorError, ValueError):
        return None


class Shard:
    """One file, mapped into memory. Slicing token_ids, ids and probabilities reads those rows as NumPy arrays; offsets
    (conversations + 1,) int64; about: the metadata."""

    def __init__(self, path: Path):
        """Raises ValueError naming the file when it is damaged or something else."""
        self.path, self.about = path, _about(path)
        if not isinstance(self.about, dict) or not {"k", "backbone"} <= set(self.about):
            raise ValueError(
                f"{path} is damaged or holds no top-k probabilities; expected a file that python -m corpus wrote"
            )
        try:
            file = safe_open(path, framework="numpy")
            self.token_ids, self.ids, self.probabilities = (
                file.get_slice(name) for name in ("token_ids", "ids", "probabilities")
            )
            self.offsets = file.get_tensor("offsets")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        rows, k = int(self.offsets[-1]), self.about["k"]
        shapes = [part.get_shape() for part in (self.token_ids, self.ids, self.probabilities)]
        if shapes != (expected := [[rows], [rows, k], [rows, k]]):
            raise ValueError(f"{path} is damaged: its parts have the shapes {shapes}, expected {expected}")


def open_shards(path: Path) -> list[Shard]:
    """The files of a folder, in order, or one file. Raises ValueError when there are none, or when they do not belong
    together."""
    if path.is_dir():
        paths = sorted((p for p in path.iterdir() if SHARD_NAME.fullmatch(p.name)), key=lambda p: int(p.stem))
    else:
        paths = [path] if path.is_file() else []
    if not paths:
        hint = f"; did you mean {top_k_folder(path)}?" if top_k_folder(path).is_dir() else ""
        raise ValueError(f"{path} holds no top-k files; expected the folder that python -m corpus wrote{hint}")
    shards = [Shard(each) for each in paths]
    names = ("k", "backbone", "weights", "tokenizer")
    for shard in shards[1:]:
        differing = [name for name in names if shard.about.get(name) != shards[0].about.get(name)]
        if differing:
            raise ValueError(
                f"{shard.path} and {shards[0].path} differ in {', '.join(differing)}; write all of them again"
            )
    return shards
