"""Plain text as blocks of tokens: files of any size, one window of text at a time.

A text is read in windows that meet at *seams*: the beginning of a line, or a space between words where a line is very
long. The tokens of the windows, laid end to end, are those that the tokenizer gives the complete text. A window
overlaps its neighbors by ``CONTEXT`` characters, whose tokens are dropped, because

- SentencePiece vocabularies put a space in front of whatever they encode; it falls into the overlap.
- the tokens of a line break depend on what follows it, and in some vocabularies on the line before it.

Where a token crosses a seam after all, so that two windows disagree about its end, they are encoded again as one.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from backbone.tokenizer import ChatTokenizer
from runtime.files.documents import HALF_CHARACTER
from trainer.data.conversations import DataReport
from trainer.data.records import located_records, read_text
from trainer.data.turns import EMPTY, HALF, Unusable, kind_of, turns_of

SUFFIXES = (".txt", ".txt.gz", ".raw")  # the last is that of WikiText's own files
SHORTEST = 3  # tokens of a block: logits at position t score token t + 2 first, so fewer carry no label
WINDOW, CONTEXT = 8192, 64  # characters of a window, and of its overlap with each neighbor
BATCH = 32  # windows tokenized in one call: enough for every thread, few enough to keep their offsets small
LINE_SEAM = re.compile(r"(?<=\n)(?=\S)")
WORD_SEAM = re.compile(r"(?<=\S)(?= \S)")


def is_plain_text(path: str | Path) -> bool:
    """Whether a file's name says that it is plain text."""
    return str(path).lower().endswith(SUFFIXES)


def holds_text(record: Any) -> bool | None:
    """Whether a record is a text, not a conversation; None where neither is filled."""
    if not isinstance(record, dict):
        return None
    if turns_of(record) not in EMPTY:
        return False
    text = record.get("text")
    return True if isinstance(text, str) and text.strip() else None


def read_texts(path: str | Path, report: DataReport) -> Iterator[Iterable[str]]:
    """The texts of a file, each in pieces to be joined: all of a plain text, or the field ``text`` of every record.

    Texts that are blank, hold half a character or are no texts are counted in ``report`` and dropped. Raises ValueError
    naming the file when nothing is left.
    """
    report.files.append(str(path))
    usable = 0
    for where, text in _plain_text(path) if is_plain_text(path) else _text_records(path):
        report.read += 1
        report.texts += 1
        if text is None:
            report.blank += 1
            report.left_out.count("without text", where)
        elif isinstance(text, Unusable):
            report.malformed += 1
            report.left_out.count(text, where)
        else:
            usable += 1
            yield text
    if not usable:
        because = f": {report.left_out.describe()}" if report.left_out.reasons else ""
        raise ValueError(
            f"no usable text in {path}: {report.read} read, {report.blank} blank, {report.malformed} malformed"
            f"{because}; expected text"
        )


def _plain_text(path: str | Path) -> Iterator[tuple[str, Iterable[str] | None]]:
    """The place and the text of a file as an iterable of pieces, None where it is blank."""
    pieces, start = read_text(Path(path)), []
    for piece in pieces:
        start.append(piece)
        if piece.strip():
            yield str(path), chain(start, pieces)
            return
    yield str(path), None


def _text_records(path: str | Path) -> Iterator[tuple[str, Iterable[str] | Unusable | None]]:
    """The place and the text of each record: None where it is blank or null, the reason where it is unusable."""
    for where, record in located_records(path):
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(record, dict):
            yield where, Unusable(f"{kind_of(record)} instead of an object")
        elif "text" not in record or turns_of(record) not in EMPTY:
            yield where, Unusable("a record without text among texts")
        elif text is not None and not isinstance(text, str):
            yield where, Unusable(f"{kind_of(text)} instead of a text")
        elif text and HALF_CHARACTER.search(text):
            yield where, Unusable(HALF)
        else:
            yield where, [text] if text and text.strip() else None


# Windows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A part of a text: ``text[first:last]`` is its own, the rest overlaps with the neighbors."""

    text: str
    first: int
    last: int
    opens: bool  # it begins the text

    def joined(self, following: Window) -> Window:
        """Both as one."""
        text = self.text[: self.last] + following.text[following.first :]
        return Window(text, self.first, self.last + following.last - following.first, self.opens)


def windows(pieces: Iterable[str], size: int = WINDOW, context: int = CONTEXT) -> Iterator[Window]:
    """A text, given in pieces, as windows of at least ``size`` characters that meet at seams.

    With size 3 and context 2, "ab\\ncd ef" is "ab\\n" and "cd ef", as the windows "[ab\\n]cd" and "b\\n[cd ef]".
    """
    text, seam, low, opens = "", 0, size, True
    for piece in pieces:
        text += piece
        start, high = 0, len(text) - context  # room for the overlap after a seam
        while low + size <= high:
            # The first line that begins within `size` characters, else the first space between words.
            found = LINE_SEAM.search(text, low, low + size) or WORD_SEAM.search(text, low, high)
            if found is None:
                low = high - 1  # search on from here
                break
            yield Window(text[start : found.start() + context], seam - start, found.start() - start, opens)
            start, seam, low, opens = max(0, found.start() - context), found.start(), found.start() + size, False
        text, seam, low = text[start:], seam - start, low - start
    yield Window(text, seam, len(text), opens)


def text_tokens(
    texts: Iterable[Iterable[str]], tokenizer: ChatTokenizer, size: int = WINDOW, context: int = CONTEXT
) -> Iterator[np.ndarray]:
    """Token ids of texts, each given in pieces, with the end-of-text token, if the vocabulary has one, between two
    texts: int32, window by window. The ids of a text are those of ``tokenizer.encode`` of all of it."""
    between = np.array(tokenizer.eos_ids[:1], dtype=np.int32)
    previous: tuple[Window, Any] | None = None
    for window, encoding in _encoded((w for text in texts for w in windows(text, size, context)), tokenizer):
        if previous and not window.opens and not _meet(*previous, window, encoding):
            window = previous[0].joined(window)
            (encoding,) = tokenizer.encode_many([window.text])
        elif previous:
            yield _own_tokens(*previous)
            if window.opens:
                yield between
        previous = window, encoding
    if previous:
        yield _own_tokens(*previous)


def _encoded(all_windows: Iterator[Window], tokenizer: ChatTokenizer) -> Iterator[tuple[Window, Any]]:
    while batch := list(islice(all_windows, BATCH)):
        yield from zip(batch, tokenizer.encode_many([window.text for window in batch]), strict=True)


def _tokens_before(encoding: Any, position: int) -> int:
    """How many tokens of an encoding start before a character."""
    return bisect_left(range(len(encoding)), position, key=lambda token: encoding.token_to_chars(token)[0])


def _own_tokens(window: Window, encoding: Any) -> np.ndarray:
    """The tokens that start in the window's own text: (num,) int32."""
    ids = np.array(encoding.ids, dtype=np.int32)
    last = len(ids) if window.last == len(window.text) else _tokens_before(encoding, window.last)
    return ids[_tokens_before(encoding, window.first) if window.first else 0 : last]


def _meet(left: Window, left_encoding: Any, right: Window, right_encoding: Any) -> bool:
    """Whether two windows agree, in characters from their seam, where the last token before it ends."""

    def end(encoding: Any, seam: int) -> int:
        count = _tokens_before(encoding, seam)
        return encoding.token_to_chars(count - 1)[1] - seam if count else -seam

    return end(left_encoding, left.last) == end(right_encoding, right.first)


# Blocks --------------------------------------------------------------------------------------------------------------


def pack(tokens: Iterable[np.ndarray], block_size: int, bos: int | None) -> Iterator[np.ndarray]:
    """A stream of tokens cut into blocks of ``block_size``, which includes ``bos`` in front, if there is one.

    The last block is shorter; with fewer than 3 tokens it is dropped. Tokens 5 to 11 in blocks of 4 with bos 1:
    [1, 5, 6, 7], [1, 8, 9, 10], and [1, 11], which is dropped.
    """
    assert block_size >= SHORTEST, block_size
    front = np.array([] if bos is None else [bos], dtype=np.int32)
    room = block_size - len(front)
    rest = np.zeros(0, dtype=np.int32)
    for arrived in tokens:
        rest = np.concatenate([rest, arrived])
        end = len(rest) - len(rest) % room
        for start in range(0, end, room):
            yield np.concatenate([front, rest[start : start + room]])
        rest = rest[end:]
    if len(front) + len(rest) >= SHORTEST:
        yield np.concatenate([front, rest])


def read_blocks(
    path: str | Path, tokenizer: ChatTokenizer, block_size: int, report: DataReport
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token_ids, mask) of the blocks of a file's texts, counted in ``report``. All tokens carry loss except the one in
    front. Raises ValueError naming the file when there is no block."""
    bos = tokenizer.bos_id
    mask = np.arange(block_size) >= (bos is not None)
    produced = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal produced
        for arrived in text_tokens(read_texts(path, report), tokenizer):
            produced += len(arrived)
            yield arrived

    for block in pack(counted(), block_size, bos):
        report.blocks += 1
        report.tokens += len(block)
        report.loss_tokens += int(mask[: len(block)].sum())
        yield block, mask[: len(block)]
    report.rest_tokens += produced - report.loss_tokens
    if not report.blocks:
        raise ValueError(f"{path} holds {produced} tokens of text, too few for a block; expected at least {SHORTEST}")
