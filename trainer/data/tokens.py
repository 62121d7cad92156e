"""Training text as token ids, with a mask over the tokens that carry loss, and the batches and labels made of it.

Conversations (``trainer.data.conversations``) are one sequence each; plain text (``trainer.data.plain_text``) is cut
into blocks; both may come from datasets folders and Parquet files (``trainer.data.parquet``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from backbone.templates import ConversationError
from backbone.tokenizer import BATCH, ChatTokenizer
from trainer.data.conversations import Conversation, DataReport, read_conversations
from trainer.data.plain_text import holds_text, is_plain_text, read_blocks
from trainer.data.records import located_records

IGNORE = -100  # label of a position without loss, PyTorch's cross_entropy default


@dataclass(frozen=True)
class TokenizedData:
    """Sequences laid end to end: sequence i occupies ``offsets[i]:offsets[i + 1]``.

    token_ids: (total,) int32. mask: (total,) bool, True where the token carries loss. offsets: (count + 1,) int64.
    weights: (count,) float64, how often an epoch takes each sequence; default: once.
    """

    token_ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        weights = np.ones(len(self)) if self.weights is None else np.asarray(self.weights, dtype=np.float64)
        assert weights.shape == (len(self),), (weights.shape, len(self))
        object.__setattr__(self, "weights", weights)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence: (count,) int64."""
        return np.diff(self.offsets)

    def conversation(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(token_ids, mask) of one sequence, as views."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.token_ids[rows], self.mask[rows]

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedData:
        """The given sequences with their weights, in the given order."""
        indices = np.asarray(indices, dtype=np.int64)
        return TokenizedData.of((self.conversation(int(index)) for index in indices), self.weights[indices])

    @staticmethod
    def of(conversations: Iterable[tuple[Any, Any]], weights: np.ndarray | None = None) -> TokenizedData:
        """Lay (token_ids, mask) pairs end to end."""
        ids, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
        for token_ids, mask in conversations:
            ids.append(np.asarray(token_ids, dtype=np.int32))
            masks.append(np.asarray(mask, dtype=np.bool_))
        offsets = np.cumsum([len(chunk) for chunk in ids], dtype=np.int64)
        return TokenizedData(np.concatenate(ids), np.concatenate(masks), offsets, weights)


# Files to tokens ------------------------------------------------------------------------------------------------------


def encoded(
    conversations: Iterable[Conversation], tokenizer: ChatTokenizer, report: DataReport
) -> Iterator[tuple[Conversation, list[int], list[bool]]]:
    """Each conversation with its token ids and its mask, lazily. One that the chat template refuses is left out and
    counted in ``report``."""
    conversations = iter(conversations)
    while batch := list(islice(conversations, BATCH)):
        reasons: dict[int, ConversationError] = {}
        found = list(tokenizer.encode_many_with_mask((talk.messages for talk in batch), reasons.__setitem__))
        for index, error in reasons.items():
            report.refused += 1
            report.left_out.count(error, batch[index].where)
        usable = (talk for index, talk in enumerate(batch) if index not in reasons)
        yield from ((talk, *each) for talk, each in zip(usable, found, strict=True))


def encode_conversations(
    conversations: Iterable[Conversation],
    tokenizer: ChatTokenizer,
    max_length: int,
    report: DataReport | None = None,
    *,
    loss_on: str = "assistant",
) -> TokenizedData:
    """Token ids and mask of each conversation, truncated to ``max_length`` tokens.

    loss_on: "assistant", or "all": every token but the beginning-of-text token at position 0. A conversation with no
    token in the loss left, or that the chat template refuses, is dropped. Truncations, drops and tokens are counted in
    ``report``. Raises ValueError when nothing is left.
    """
    assert max_length > 0 and loss_on in ("assistant", "all"), (max_length, loss_on)
    report = DataReport() if report is None else report
    report.truncated = report.too_long = report.refused = 0
    bos = tokenizer.bos_id

    def truncated() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for talk, token_ids, mask in encoded(conversations, tokenizer, report):
            if loss_on == "all":
                mask = [token_ids[0] != bos] + [True] * (len(token_ids) - 1)
            if not any(mask[:max_length]):
                report.too_long += 1
                report.left_out.count(f"without a token in the loss among the first {max_length}", talk.where)
                continue
            report.truncated += len(token_ids) > max_length
            yield np.array(token_ids[:max_length], dtype=np.int32), np.array(mask[:max_length], dtype=np.bool_)

    data = TokenizedData.of(truncated())
    if not len(data):
        files = ", ".join(report.files) or "memory"
        if report.refused:
            raise ValueError(f"no conversation of {files} can be used: {report.left_out.describe()}; see --template")
        raise ValueError(
            f"none of {report.too_long} conversations from {files} has a token in the loss among its first "
            f"{max_length}; raise max_length"
        )
    report.kept, report.tokens, report.loss_tokens = len(data), len(data.token_ids), int(data.mask.sum())
    return data


def is_text_file(path: str | Path) -> bool:
    """Whether a file holds text: by its name, or by its first record in which a text or a conversation is filled; where
    none is, by whether there are fields for texts."""
    if is_plain_text(path):
        return True
    empty, named = True, False
    for _, record in located_records(path):
        found, empty = holds_text(record), False
        if found is not None:
            return found
        named |= isinstance(record, dict) and "text" in record
    if empty:
        raise ValueError(f"{path} is empty; expected records with conversations, messages or text")
    return named


def load_data(
    files: Sequence[str | Path],
    tokenizer: ChatTokenizer,
    *,
    max_length: int,
    block_size: int,
    loss_on: str = "assistant",
    weights: Sequence[float] = (),
) -> tuple[TokenizedData, DataReport]:
    """The sequences of files of any kind, laid end to end in the order of the files, and the report on their records.

    Conversations are truncated to ``max_length`` tokens; text becomes blocks of ``block_size`` tokens, at most
    ``max_length``. loss_on: as in ``encode_conversations``; all of a text carries loss in either case. weights: how
    often an epoch takes the sequences of each file; default: once. Raises ValueError naming the first file that is
    broken or holds nothing to train on.
    """
    assert files and len(weights) in (0, len(files)), (files, weights)
    report, parts = DataReport(), []
    for path in files:
        part = DataReport()
        if is_text_file(path):
            parts.append(TokenizedData.of(read_blocks(path, tokenizer, min(block_size, max_length), part)))
        else:
            talks = read_conversations([path], part)
            parts.append(encode_conversations(talks, tokenizer, max_length, part, loss_on=loss_on))
        report.add(part)
    if len(parts) == 1 and (not weights or weights[0] == 1):
        return parts[0], report  # no second copy of a large file
    joined = TokenizedData(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.mask for part in parts]),
        np.cumsum([0, *np.concatenate([part.lengths for part in parts])], dtype=np.int64),
        np.repeat(np.array(list(weights) or [1.0] * len(files)), [len(part) for part in parts]),
    )
    return joined, report


def check_vocabulary(data: TokenizedData, vocab_size: int) -> None:
    """Raises ValueError naming the first token that is no row of a backbone's embedding, and how many there are."""
    outside = np.flatnonzero((data.token_ids < 0) | (data.token_ids >= vocab_size))
    if len(outside):
        place = int(outside[0])
        index = int(np.searchsorted(data.offsets, place, side="right")) - 1
        kind = "label" if data.mask[place] else "token id"
        more = f" (and {len(outside) - 1:,} more)" if len(outside) > 1 else ""
        raise ValueError(
            f"{kind} {data.token_ids[place]} at token {place - data.offsets[index]} of conversation {index}{more} is "
            f"outside the backbone's vocabulary of {vocab_size}; the tokenizer belongs to another model"
        )


# Batches and labels ---------------------------------------------------------------------------------------------------


def repeats(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """How often epoch ``epoch``, counted from 0, takes each sequence: (count,) int64.

    Sequence i is taken floor((epoch + 1) w_i + u_i) - floor(epoch w_i + u_i) times, which adds up to its weight w_i
    per epoch. The phases u_i of n sequences of the same weight are (k + 1/2) / n in an order drawn from ``seed``, so
    that each epoch takes as equal a share of them as possible. Weight 1 is once an epoch, whatever the phase; of four
    sequences of weight 0.5 every epoch takes two, and the next epoch the other two.
    """
    phases = np.empty(len(weights))
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    for weight in np.unique(weights):
        alike = np.flatnonzero(weights == weight)
        phases[alike] = (random.permutation(len(alike)) + 0.5) / len(alike)
    return (np.floor((epoch + 1) * weights + phases) - np.floor(epoch * weights + phases)).astype(np.int64)


def batches(data: TokenizedData, tokens_per_batch: int, *, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """Sequence indices in an order drawn from (seed, epoch), filled greedily into batches.

    A batch is closed when the next sequence would take it past ``tokens_per_batch`` tokens. One that is longer by
    itself is a batch of its own. A sequence is taken as often as its weight says (``repeats``). A pure function of the
    lengths, the weights and the arguments: a resumed run finds the rest of an epoch by asking for the same epoch.

    Lengths 3, 4, 2, 9 drawn in this order with 8 tokens a batch: [3, 4], [2], [9].
    """
    assert tokens_per_batch > 0, tokens_per_batch
    lengths = data.lengths
    result: list[list[int]] = []
    room = 0
    taken = np.repeat(np.arange(len(data)), repeats(data.weights, seed, epoch))
    for index in taken[np.random.default_rng([seed, epoch]).permutation(len(taken))].tolist():
        length = int(lengths[index])
        if not result or length > room:
            result.append([])
            room = tokens_per_batch
        result[-1].append(index)
        room -= length
    return result


def targets(data: TokenizedData, num_depths: int) -> np.ndarray:
    """Labels of every position and depth: (num_depths, total) int32.

    Logits at depth k and position t score token t + 2 + k. The label is that token where it is in the same
    conversation and is the assistant's, else -100. One conversation of five tokens, the last three the assistant's:

        t            0    1    2    3    4
        token_ids   10   11   12   13   14
        mask         F    F    T    T    T
        depth 0     12   13   14 -100 -100
        depth 1     13   14 -100 -100 -100
    """
    total = len(data.token_ids)
    ends = np.repeat(data.offsets[1:], data.lengths)  # for every position the first one of the next conversation
    labels = np.full((num_depths, total), IGNORE, dtype=np.int32)
    replies = np.where(data.mask, data.token_ids, IGNORE)
    for depth in range(min(num_depths, max(total - 2, 0))):
        ahead = 2 + depth
        inside = np.arange(ahead, total) < ends[: total - ahead]
        labels[depth, : total - ahead] = np.where(inside, replies[ahead:], IGNORE)
    return labels


def labelled_positions(data: TokenizedData, num_depths: int) -> tuple[np.ndarray, np.ndarray]:
    """The positions that carry loss, (num,) int32 ascending, and their labels, (num_depths, num) int32.

    A position carries loss when the token after it is the assistant's (while decoding, the root always is) and at
    least one depth has a label.
    """
    labels = targets(data, num_depths)
    root_is_reply = np.append(data.mask[1:], False)
    positions = np.flatnonzero((labels != IGNORE).any(axis=0) & root_is_reply).astype(np.int32)
    return positions, np.ascontiguousarray(labels[:, positions])
