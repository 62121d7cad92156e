"""Plain text as blocks of tokens: files of any size, one window of text at a time.

A text is read in windows that meet at *seams*, and the tokens of the windows, laid end to end, are those that the
tokenizer gives the whole text. A seam is the beginning of a line, or a space between words where a line is very long:
no pre-tokenizer of the Llama family lets a token cross either. Three things would go wrong if a paragraph were encoded
by itself, so a window overlaps its neighbours by ``CONTEXT`` characters whose tokens are then left out:

- SentencePiece vocabularies put a space in front of whatever they encode: a space that is not in the text. Here it
  falls into the overlap; the first window of a text keeps it, and decoding takes it away again.
- What a line break becomes depends on what follows it: byte-level vocabularies make two tokens of "\\n\\n" before a
  word, and possibly one at the end of a text. The overlap lets the tokenizer see what follows.
- A line break belongs to the line before it, in one token with a full stop in some vocabularies.

Should two windows disagree about where a token ends at their seam, because a token crosses it after all, they are
encoded again as one: the text never loses or repeats a character. Decoding the blocks of a text, without the token in
front of each, gives the text back wherever decoding the tokens of the whole does.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from backbone.tokenizer import ChatTokenizer
from trainer.data.conversations import HALF_CHARACTER, DataReport, located_records, read_text

SUFFIXES = (".txt", ".txt.gz", ".raw")  # the last is that of WikiText's own files
SHORTEST = 3  # tokens of a block: logits at position t score token t + 2 first, so fewer carry no label
WINDOW, CONTEXT = 8192, 64  # characters of a window, and of its overlap with each neighbour
BATCH = 32  # windows tokenized in one call: enough for every thread, few enough to keep their offsets small
LINE_SEAM = re.compile(r"(?<=\n)(?=\S)")
WORD_SEAM = re.compile(r"(?<=\S)(?= \S)")


def is_plain_text(path: str | Path) -> bool:
    """Whether a file's name says that it is plain text."""
    return str(path).lower().endswith(SUFFIXES)


def read_texts(path: str | Path, report: DataReport) -> Iterator[Iterable[str]]:
    """The texts of a file, each as pieces to be joined: a plain text as a whole, or the field ``text`` of every record.

    Texts that are blank or hold half a character are counted in ``report`` and left out. Raises ValueError naming the
    file, and line or row, for a record of another shape, and when nothing is left.
    """
    report.files.append(str(path))
    pieces = _plain_text(path) if is_plain_text(path) else _text_records(path)
    kept = 0
    for text in pieces:
        report.read += 1
        report.texts += 1
        if text is None:
            report.blank += 1
        elif isinstance(text, str) and HALF_CHARACTER.search(text):
            report.malformed += 1
        else:
            kept += 1
            yield [text] if isinstance(text, str) else text
    if not kept:
        raise ValueError(
            f"no usable text in {path}: {report.read} read, {report.blank} blank, {report.malformed} malformed; "
            "expected text"
        )


def _plain_text(path: str | Path) -> Iterator[Iterable[str] | None]:
    """The text of a file as an iterable of pieces, None where it is blank."""
    pieces, head = read_text(Path(path)), []
    for piece in pieces:
        head.append(piece)
        if piece.strip():
            break
    else:
        yield None
        return

    def whole() -> Iterator[str]:
        yield from head
        yield from pieces

    yield whole()


def _text_records(path: str | Path) -> Iterator[str | None]:
    """The text of each record, None where it is blank or null."""
    for where, record in located_records(path):
        if not isinstance(record, dict) or "text" not in record:
            got = (
                f"the keys {', '.join(map(str, record))}" if isinstance(record, dict) else f"a {type(record).__name__}"
            )
            raise ValueError(f"{where}: expected an object with text, got {got}")
        text = record["text"]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{where}: text is a {type(text).__name__}, expected a string")
        yield text if text is not None and text.strip() else None


# Windows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A stretch of a text: ``text[first:last]`` is its own, the rest its overlap with the neighbours."""

    text: str
    first: int
    last: int
    opens: bool  # the text begins here

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
        start, high = 0, len(text) - context  # behind a seam there is its overlap
        while low + size <= high:
            # The first line that begins within `size` characters, else the first space between words.
            found = LINE_SEAM.search(text, low, low + size) or WORD_SEAM.search(text, low, high)
            if found is None:
                low = high - 1  # what was looked through is not looked at again
                break
            yield Window(text[start : found.start() + context], seam - start, found.start() - start, opens)
            start, seam, low, opens = max(0, found.start() - context), found.start(), found.start() + size, False
        text, seam, low = text[start:], seam - start, low - start
    yield Window(text, seam, len(text), opens)


def text_tokens(
    texts: Iterable[Iterable[str]], tokenizer: ChatTokenizer, size: int = WINDOW, context: int = CONTEXT
) -> Iterator[np.ndarray]:
    """Token ids of texts, each given in pieces, with the end-of-text token between two texts: int32, window by window.

    The ids of a text are those of ``tokenizer.encode`` of the whole. A vocabulary without end token puts nothing
    between texts.
    """
    between = np.array(tokenizer.eos_ids[:1], dtype=np.int32)
    held: tuple[Window, Any] | None = None
    for window, encoding in _encoded((w for text in texts for w in windows(text, size, context)), tokenizer):
        if held and not window.opens and not _meet(*held, window, encoding):
            window = held[0].joined(window)
            (encoding,) = tokenizer.encode_many([window.text])
        elif held:
            yield _own_tokens(*held)
            if window.opens:
                yield between
        held = window, encoding
    if held:
        yield _own_tokens(*held)


def _encoded(all_windows: Iterator[Window], tokenizer: ChatTokenizer) -> Iterator[tuple[Window, Any]]:
    while batch := list(islice(all_windows, BATCH)):
        encodings = tokenizer.encode_many([window.text for window in batch])
        yield from zip(batch, encodings, strict=True)


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
    """A stream of tokens cut into blocks of ``block_size``, each with ``bos`` in front (one of them), if there is one.

    The last block is shorter; with fewer than 3 tokens it is left out. Tokens 5 to 11 in blocks of 4 behind bos 1:
    [1, 5, 6, 7], [1, 8, 9, 10], and [1, 11], which is left out.
    """
    if block_size < SHORTEST:
        raise ValueError(f"block_size is {block_size}, expected at least {SHORTEST} tokens")
    front = np.array([] if bos is None else [bos], dtype=np.int32)
    room = block_size - len(front)
    rest = np.zeros(0, dtype=np.int32)
    for arrived in tokens:
        rest = np.concatenate([rest, arrived])
        whole = len(rest) - len(rest) % room
        for start in range(0, whole, room):
            yield np.concatenate([front, rest[start : start + room]])
        rest = rest[whole:]
    if len(front) + len(rest) >= SHORTEST:
        yield np.concatenate([front, rest])


def read_blocks(
    path: str | Path, tokenizer: ChatTokenizer, block_size: int, report: DataReport
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token_ids, mask) of the blocks that a file's texts make, counted in ``report``: all tokens but the one in front
    carry loss. Raises ValueError naming the file when they make none."""
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
