"""Conversations from files, as token ids with a mask over what the assistant says, and batches of them.

    python -m trainer.data --inspect conversations.jsonl

prints conversations with the tokens that carry loss in colour: the quickest way to see that a chat template and a
backbone belong together.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backbone.tokenizer import ChatTokenizer

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
SPLIT_SEED = 0
IGNORE = -100  # label of a position without loss, PyTorch's cross_entropy default
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Conversation:
    """A conversation that alternates user and assistant, a system message possibly before it, an answer at its end."""

    messages: tuple[dict[str, str], ...]
    id: str = ""
    category: str = ""


@dataclass
class DataReport:
    """What became of the records that were read. All numbers count conversations except where a name says more."""

    files: list[str] = field(default_factory=list)
    read: int = 0
    blank: int = 0  # no assistant text: dropped
    malformed: int = 0  # turns do not alternate, an empty turn among others, half a character: dropped
    trimmed: int = 0  # replies before the first question, or a last question without answer: cut off, rest kept
    kept: int = 0
    truncated: int = 0  # cut at max_length tokens
    too_long: int = 0  # no assistant token left after the cut: dropped
    tokens: int = 0
    loss_tokens: int = 0

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.kept:,} of {self.read:,} conversations from {', '.join(Path(f).name for f in self.files)}"]
        dropped = {"blank": self.blank, "malformed": self.malformed, "too long": self.too_long}
        lost = [f"{count:,} {reason}" for reason, count in dropped.items() if count]
        if lost:
            parts.append("dropped " + ", ".join(lost))
        if self.trimmed:
            parts.append(f"{self.trimmed:,} trimmed to whole question-answer turns")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens, {self.loss_tokens:,} of them the assistant's")
        return "; ".join(parts)


# Reading -------------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; expected JSON or JSON lines, possibly .gz") from error


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of a JSON list or of JSON lines. Raises ValueError with file and line where JSON is broken."""
    text = _read_text(path)
    # splitlines() would also cut at characters such as U+2028, which JSON strings may hold as they are.
    yield from _list_records(path, text) if text.lstrip().startswith("[") else _line_records(path, text.split("\n"))


def _line_records(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number}: not valid JSON ({error.msg}, column {error.colno})") from error


def _list_records(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Items of one JSON list, decoded one by one so that each knows its line."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    def fail(position: int, message: str) -> ValueError:
        return ValueError(f"{path} line {1 + text.count(chr(10), 0, position)}: not valid JSON ({message})")

    position = skip(skip(0) + 1)
    if text[position : position + 1] == "]":
        return
    while True:
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise fail(error.pos, error.msg) from error
        line, counted = line + text.count("\n", counted, position), position
        yield line, record
        end = skip(end)
        mark = text[end : end + 1]
        if mark == "]":
            if skip(end + 1) < len(text):
                raise fail(skip(end + 1), "text after the list")
            return
        if mark != ",":
            raise fail(end, "expected ',' or ']'" if mark else "the list does not end: truncated?")
        position = skip(end + 1)


def _messages(record: Any, where: str) -> list[dict[str, str]]:
    """The turns of a record in our form. Raises ValueError for a record of another shape."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: got a {type(record).__name__}, expected an object with conversations or messages")
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list):
        raise ValueError(
            f"{where}: expected a list under conversations or messages, got the keys {', '.join(map(str, record))}"
        )
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: turn {number} is a {type(turn).__name__}, expected an object")
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{where}: turn {number} is from {role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{where}: turn {number} holds {content!r:.40}, expected text under value or content")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _whole_turns(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without replies before the first question and without a last question that has no answer."""
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    while turns and turns[-1]["role"] == "user":
        turns = turns[:-1]
    return system + turns


def _is_sound(messages: list[dict[str, str]]) -> bool:
    """User and assistant in turns, a system message only in front, no empty turn, and text that UTF-8 can write.

    Half an emoji, cut in two by whoever truncated the text, is valid in JSON and nowhere else.
    """
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not all(turn["content"].strip() for turn in turns):
        return False
    return not any(HALF_CHARACTER.search(turn["content"]) for turn in messages)


def load_conversations(paths: Iterable[str | Path] | str | Path) -> tuple[list[Conversation], DataReport]:
    """Conversations of ShareGPT-shaped files: a JSON list or JSON lines, gzipped or not.

    A record holds its turns under ``conversations`` or ``messages``, each as ``from``/``value`` or
    ``role``/``content``. Broken JSON and records of another shape raise ValueError with file and line. Conversations
    that are well formed but cannot be learnt from are left out and counted; nothing is merged or made up. Raises
    ValueError naming the files when nothing is left.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    report = DataReport(files=[str(path) for path in paths])
    kept: list[Conversation] = []
    for path in map(Path, paths):
        for line, record in records(path):
            report.read += 1
            messages = _messages(record, f"{path} line {line}")
            if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
                report.blank += 1
                continue
            whole = _whole_turns(messages)
            if not any(turn["role"] == "assistant" for turn in whole) or not _is_sound(whole):
                report.malformed += 1
                continue
            report.trimmed += len(whole) < len(messages)
            kept.append(Conversation(tuple(whole), str(record.get("id", "")), str(record.get("category", ""))))
    report.kept = len(kept)
    if not kept:
        raise ValueError(
            f"no usable conversation in {', '.join(report.files) or 'no files'}: {report.read} read, {report.blank} "
            f"blank, {report.malformed} malformed; expected user and assistant turns that alternate"
        )
    return kept, report


# Tokens --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizedData:
    """Conversations laid end to end: number i occupies ``offsets[i]:offsets[i + 1]``.

    token_ids: (total,) int32. mask: (total,) bool, True where the token is the assistant's.
    offsets: (count + 1,) int64.
    """

    token_ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation: (count,) int64."""
        return np.diff(self.offsets)

    def conversation(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(token_ids, mask) of one conversation, as views."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.token_ids[rows], self.mask[rows]

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedData:
        """The given conversations, in the given order."""
        return TokenizedData.of(self.conversation(int(index)) for index in indices)

    @staticmethod
    def of(conversations: Iterable[tuple[Any, Any]]) -> TokenizedData:
        """Lays (token_ids, mask) pairs end to end."""
        ids, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
        for token_ids, mask in conversations:
            ids.append(np.asarray(token_ids, dtype=np.int32))
            masks.append(np.asarray(mask, dtype=np.bool_))
        offsets = np.cumsum([len(chunk) for chunk in ids], dtype=np.int64)
        return TokenizedData(np.concatenate(ids), np.concatenate(masks), offsets)


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: ChatTokenizer,
    max_length: int,
    report: DataReport | None = None,
) -> TokenizedData:
    """Token ids and mask of each conversation, cut at ``max_length`` tokens.

    A conversation with no assistant token left after the cut is dropped. Cuts, drops and tokens are counted in
    ``report``. Raises ValueError when nothing is left.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}, expected at least 1 token")
    report = DataReport() if report is None else report
    report.truncated = report.too_long = 0

    def cut() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for token_ids, mask in tokenizer.encode_many_with_mask([talk.messages for talk in conversations]):
            if not any(mask[:max_length]):
                report.too_long += 1
                continue
            report.truncated += len(token_ids) > max_length
            yield np.array(token_ids[:max_length], dtype=np.int32), np.array(mask[:max_length], dtype=np.bool_)

    data = TokenizedData.of(cut())
    if not len(data):
        raise ValueError(
            f"none of {len(conversations)} conversations from {', '.join(report.files) or 'memory'} has an assistant "
            f"token among its first {max_length}; raise max_length"
        )
    report.kept, report.tokens, report.loss_tokens = len(data), len(data.token_ids), int(data.mask.sum())
    return data


def split_held_out(data: TokenizedData, amount: float | int, seed: int) -> tuple[TokenizedData, TokenizedData]:
    """(training, held out): a fraction below 1 or a whole number of conversations is held out.

    The choice hashes ``seed`` and the tokens of each conversation, so it depends neither on the order of the files nor
    on what else is in them, and copies of a conversation stay on one side: the held-out part may be larger by those.
    """
    count = round(amount * len(data)) if isinstance(amount, float) else amount
    if isinstance(amount, float) and not 0 < amount < 1:
        raise ValueError(f"held-out fraction is {amount}, expected one between 0 and 1, or a whole number")
    count = max(int(count), 1) if isinstance(amount, float) else int(count)
    if not 0 < count < len(data):
        raise ValueError(f"cannot hold out {count} of {len(data)} conversations; expected 1 to {len(data) - 1}")
    key = seed.to_bytes(8, "little", signed=True)
    digests = [
        hashlib.blake2b(data.conversation(index)[0].tobytes(), digest_size=8, key=key).digest()
        for index in range(len(data))
    ]
    last = sorted(digests)[count - 1]
    held_out = np.array([digest <= last for digest in digests])
    if held_out.all():
        raise ValueError(f"the {len(data)} conversations are copies of too few to hold out {count}; add data")
    return data.select(np.flatnonzero(~held_out)), data.select(np.flatnonzero(held_out))


def hold_out(data: TokenizedData, wanted: int) -> tuple[TokenizedData, TokenizedData]:
    """The split of every run, (training, held out): at most ``wanted`` conversations and a tenth of them. The same ones
    whatever a run's own seed is, so that runs can be compared."""
    return split_held_out(data, min(wanted, max(1, len(data) // 10)), SPLIT_SEED)


def batches(
    data: TokenizedData, tokens_per_batch: int, *, max_rows: int | None = None, seed: int = 0, epoch: int = 0
) -> list[list[int]]:
    """Conversation indices in an order drawn from (seed, epoch), filled greedily into batches.

    A batch is closed when the next conversation would take it past ``tokens_per_batch`` tokens or ``max_rows``
    conversations. One that is longer by itself is a batch of its own. Every conversation comes once an epoch.

    Lengths 3, 4, 2, 9 drawn in this order with 8 tokens a batch: [3, 4], [2], [9].
    """
    if tokens_per_batch < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"tokens_per_batch is {tokens_per_batch} and max_rows {max_rows}, expected at least 1")
    lengths = data.lengths
    result: list[list[int]] = []
    room = 0
    for index in np.random.default_rng([seed, epoch]).permutation(len(data)).tolist():
        length = int(lengths[index])
        if not result or length > room or len(result[-1]) == max_rows:
            result.append([])
            room = tokens_per_batch
        result[-1].append(index)
        room -= length
    return result


def targets(mask: np.ndarray, token_ids: np.ndarray, offsets: np.ndarray, num_depths: int) -> np.ndarray:
    """Labels of every position and depth: (num_depths, total) int32.

    Logits at depth k and position t score token t + 2 + k. The label is that token where it lies in the same
    conversation and is the assistant's, else -100. One conversation of five tokens, the last three the assistant's:

        t            0    1    2    3    4
        token_ids   10   11   12   13   14
        mask         F    F    T    T    T
        depth 0     12   13   14 -100 -100
        depth 1     13   14 -100 -100 -100
    """
    total = len(token_ids)
    assert mask.shape == (total,) and offsets[0] == 0 and offsets[-1] == total, (mask.shape, total, offsets[[0, -1]])
    # The first position of the next conversation, for every position.
    ends = np.repeat(offsets[1:], np.diff(offsets))
    labels = np.full((num_depths, total), IGNORE, dtype=np.int32)
    said = np.where(mask, token_ids, IGNORE)
    for depth in range(min(num_depths, max(total - 2, 0))):
        ahead = 2 + depth
        inside = np.arange(ahead, total) < ends[: total - ahead]
        labels[depth, : total - ahead] = np.where(inside, said[ahead:], IGNORE)
    return labels


def useful_positions(labels: np.ndarray) -> np.ndarray:
    """Positions with a label at any depth: (num,) int64, ascending. labels: (num_depths, total)."""
    return np.flatnonzero((labels != IGNORE).any(axis=0))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: ``trainer.inspect``'s."""
    from trainer.inspect import main as inspect_file

    return inspect_file(arguments)


if __name__ == "__main__":
    sys.exit(main())
