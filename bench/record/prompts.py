"""Prompts for measurement, read from the files the field publishes.

A file is recognized by the shape of its records, not by its name, so a renamed or gzipped copy reads the same. Every
record becomes a ``Prompt``: the user's turns, in order, with a category to spread a sample over.
"""

from __future__ import annotations

import hashlib
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.files.documents import parse_json
from runtime.files.regular import open_regular, unpack
from runtime.files.shown import shown

HUMAN_ROLES = ("human", "user")
# keys that identify a shape -> (its name in messages, key of the id, key of the text, category without one)
KNOWN_SHAPES = {
    ("question_id", "turns"): ("MT-Bench, Vicuna-bench, Spec-Bench", "question_id", "turns", "question"),
    ("conversations",): ("ShareGPT", "id", "conversations", "chat"),
    ("question", "answer"): ("GSM8K", None, "question", "math"),
    ("task_id", "prompt"): ("HumanEval", "task_id", "prompt", "coding"),
}
# The beginning of a JSON list or object; "[INST] ..." and "{name}, ..." are text.
JSON_OPENING = re.compile(r'\s*(\[\s*[\[{"\]]|\{\s*["}])')


@dataclass(frozen=True)
class Prompt:
    """One conversation to generate for: the user's turns in order, none of them blank."""

    prompt_id: str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file, and what was left out of it.

    dropped: counts over the file: ``blank_turns``, ``blank_prompts`` (only blank turns) and
    ``no_human_turns`` (conversations in which no user speaks). sha256: of the file's bytes, before unzipping.
    """

    prompts: tuple[Prompt, ...]
    dropped: dict[str, int]
    source: str
    sha256: str


def load_prompts(path: str | Path, num_prompts: int | None = None, seed: int = 0) -> PromptSet:
    """Read a prompt file: MT-Bench, Vicuna-bench, Spec-Bench, ShareGPT, GSM8K, HumanEval or plain text.

    JSON may be a list or one record per line; plain text is one prompt per paragraph; each may be gzipped. Ids are
    unique within the set: the second record with an id gets ``#2``. With ``num_prompts`` the sample is spread
    over the categories (see ``spread``); a file with fewer prompts gives them all.

    Raises ValueError, naming the file and the line or record, for malformed JSON, text that is not UTF-8, an
    unknown shape and a file without a prompt; OSError if the file cannot be read.
    """
    with open_regular(path) as file:
        raw = file.read()
    text = _decode(raw, path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    dropped = {"blank_turns": 0, "blank_prompts": 0, "no_human_turns": 0}
    prompts = []
    for prompt in _parse(text, path):
        turns = tuple(turn for turn in prompt.turns if turn.strip())
        dropped["blank_turns"] += len(prompt.turns) - len(turns)
        if turns:
            prompts.append(Prompt(prompt.prompt_id, prompt.category, turns))
        else:
            dropped["blank_prompts" if prompt.turns else "no_human_turns"] += 1
    if not prompts:
        raise ValueError(f"{path}: no prompt is left; dropped {dropped}")
    unique = _unique_ids(prompts)
    if num_prompts is not None:
        unique = spread(unique, num_prompts, seed)
    return PromptSet(tuple(unique), dropped, str(path), hashlib.sha256(raw).hexdigest())


def join_prompt_sets(sets: Sequence[PromptSet]) -> PromptSet:
    """Several sets as one: ids made unique again, dropped counts summed, sha256 of the sets' hashes in order."""
    dropped: Counter[str] = Counter()
    for one in sets:
        dropped.update(one.dropped)
    digest = hashlib.sha256("".join(one.sha256 for one in sets).encode()).hexdigest()
    prompts = _unique_ids(prompt for one in sets for prompt in one.prompts)
    return PromptSet(tuple(prompts), dict(dropped), " + ".join(one.source for one in sets), digest)


def spread(prompts: Sequence[Prompt], num_prompts: int, seed: int = 0) -> list[Prompt]:
    """``num_prompts`` prompts, or all if there are fewer, taken round robin over the categories.

    Categories come in the order of their first appearance. seed 0 keeps the file's order within a category; another
    seed shuffles within it. A smaller sample is the beginning of a larger one.

    Example: categories a a a b, four asked for: a1 b1 a2 a3.
    """
    queues: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        queues.setdefault(prompt.category, []).append(prompt)
    if seed:
        for category, queue in queues.items():
            random.Random(f"{seed}:{category}").shuffle(queue)
    longest = max((len(queue) for queue in queues.values()), default=0)
    rounds = (queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue))
    return [prompt for _, prompt in zip(range(num_prompts), rounds, strict=False)]


def _unique_ids(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The same prompts; a repeated id gets the first free of ``#2``, ``#3``, ..."""
    prompts = list(prompts)
    taken = {prompt.prompt_id for prompt in prompts}
    seen: dict[str, int] = {}
    result = []
    for prompt in prompts:
        name, count = prompt.prompt_id, seen.get(prompt.prompt_id, 0) + 1
        if count > 1:
            while f"{name}#{count}" in taken:
                count += 1
            prompt = Prompt(f"{name}#{count}", prompt.category, prompt.turns)
            taken.add(prompt.prompt_id)
        seen[name] = count
        result.append(prompt)
    return result


def _decode(raw: bytes, path: str | Path) -> str:
    """The file's text, unzipped if it begins with gzip's two bytes."""
    try:
        raw = unpack(raw, path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip data: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def _parse(text: str, path: str | Path) -> Iterator[Prompt]:
    """The prompts of the file, blank turns included."""
    if not JSON_OPENING.match(text):
        blocks = [block.strip("\r\n") for block in re.split(r"\n[ \t\r]*\n", text) if block.strip()]
        for number, block in enumerate(blocks, start=1):
            yield Prompt(str(number), "text", (block,))
        return
    for number, (where, record) in enumerate(_json_records(text, path), start=1):
        yield _prompt_from(record, number, where)


def _json_records(text: str, path: str | Path) -> Iterator[tuple[str, object]]:
    """(place in the file, record) of a JSON list, of JSON lines, or of one object over several lines."""
    if text.lstrip().startswith("["):
        for number, record in enumerate(parse_json(text, path), start=1):
            yield f"{path}: record {number}", record
        return
    try:
        whole = parse_json(text, path)
    except ValueError:
        if text.lstrip().split("\n", 1)[0].strip() == "{":  # one object over several lines
            raise
    else:
        yield f"{path}:1", whole
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, path, number)


def _prompt_from(record: object, number: int, where: str) -> Prompt:
    """The prompt of one record, recognized by its keys; ``number`` is its id if the record has none."""
    known = "; ".join(f"{name}: {', '.join(keys)}" for keys, (name, *_) in KNOWN_SHAPES.items())
    if not isinstance(record, dict):
        raise ValueError(f"{where}: unknown shape: a {type(record).__name__}, not an object; known shapes are {known}")
    shape = next((keys for keys in KNOWN_SHAPES if all(key in record for key in keys)), None)
    if shape is None:
        found = ", ".join(sorted(record))[:200] or "none"
        raise ValueError(f"{where}: unknown shape: the record's keys are {found}; known shapes are {known}")
    _, id_key, text_key, category = KNOWN_SHAPES[shape]
    if record.get("category") is not None:
        category = record["category"]
    if not isinstance(category, str):
        raise ValueError(f"{where}: category must be a string, got {shown(category)}")
    turns = record[text_key]
    if text_key == "conversations":
        turns = _human_turns(turns, where)
    elif text_key != "turns":
        turns = [turns]
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"{where}: the turns must be a list of strings, got {shown(turns)}")
    return Prompt(str(record.get(id_key, number)), category, tuple(turns))


def _human_turns(messages: object, where: str) -> list[str]:
    """The user's turns of a conversation of from/value or role/content messages."""
    if not isinstance(messages, list):
        raise ValueError(f"{where}: conversations must be a list of messages, got {shown(messages)}")
    turns = []
    for message in messages:
        pairs = (("from", "value"), ("role", "content"))
        keys = next((pair for pair in pairs if isinstance(message, dict) and all(key in message for key in pair)), None)
        if keys is None:
            raise ValueError(f"{where}: a message must have from/value or role/content, got {shown(message)}")
        speaker, content = message[keys[0]], message[keys[1]]
        if not isinstance(content, str):
            raise ValueError(f"{where}: a message's {keys[1]} must be a string, got {shown(content)}")
        if speaker in HUMAN_ROLES:
            turns.append(content)
    return turns
