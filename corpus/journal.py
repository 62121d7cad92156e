"""An unfinished corpus on disk, so that an interrupted run can be resumed.

While FILE is being written, FILE.partial/ is beside it: ``begun.json`` holds what decides the corpus, ``talks.jsonl`` a
line for each conversation that is over, accepted or not, in order. A killed run loses only the conversations in
progress. They depend on the seed and their index, so they are generated again, and the finished file is that of an
uninterrupted run.
"""

from __future__ import annotations

import contextlib
import gzip
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpus.dialogue import Dialogue
from runtime.atomic import atomic_file, check_writable
from runtime.files.documents import parse_json, read_json, to_json, write_json
from runtime.files.lock import locked
from trainer.data.prompts import Prompt

BEGUN, TALKS = "begun.json", "talks.jsonl"
# Stored of a conversation that is over; the other fields serve while it is generated.
STORED = ("index", "category", "greedy", "num_tokens", "loops", "dropped", "cut", "messages")


def partial_folder(out: Path) -> Path:
    """The folder of the unfinished corpus."""
    return out.with_name(f"{out.name}.partial")


def check_begun(out: Path, terms: dict[str, Any]) -> None:
    """Raises ValueError when an unfinished ``out`` was begun with other terms, naming those that differ.

    terms: some or all of what decides the corpus, JSON-ready, by the option that sets it.
    """
    path = partial_folder(out) / BEGUN
    if not path.exists():
        return
    try:
        begun = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete {path.parent} to start over") from error
    differing = [f"{name}: {begun.get(name)}, now {value}" for name, value in terms.items() if begun.get(name) != value]
    if differing:
        raise ValueError(
            f"{path.parent} was begun with other options: {'; '.join(differing)}; repeat the original command to "
            "resume it, or delete the folder to start over"
        )


class Journal:
    """The conversations that are over. ``count``: how many; ``folder``: where they are stored.

    Leaving the context closes the folder, and removes it if it holds no conversation. One process can open it at a
    time.
    """

    def __init__(self, out: Path, terms: dict[str, Any]):
        """Begin or resume ``out``. Raises OSError when it cannot be written, ValueError when it was begun with other
        terms (see ``check_begun``) and while another process writes it."""
        check_writable(out)
        self.folder = partial_folder(out)
        self._path = self.folder / TALKS
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder))
            self._file = stack.enter_context(open(self._path, "ab", buffering=0))
            check_begun(out, terms)
            if not (self.folder / BEGUN).exists():
                self._file.truncate(0)
                write_json(self.folder / BEGUN, terms)
            self.count = self._recover()
            self._stack = stack.pop_all()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            if not self.count:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _recover(self) -> int:
        """Cut off an incomplete last line; returns the number of lines."""
        count = end = 0
        with open(self._path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                count, end = count + 1, end + len(line)
        self._file.truncate(end)
        return count

    def append(self, dialogue: Dialogue) -> None:
        """Store a conversation; once this returns, killing the process does not lose it."""
        assert dialogue.index == self.count, (dialogue.index, self.count)
        line = to_json({name: getattr(dialogue, name) for name in STORED}) + "\n"
        rest = line.encode()
        while rest:
            rest = rest[self._file.write(rest) :]
        self.count += 1

    def dialogues(self, prompts: list[Prompt] | None) -> Iterator[Dialogue]:
        """The stored conversations, as they were when they ended. Raises ValueError for a damaged file."""
        with open(self._path, "rb") as file:
            for index in range(self.count):
                try:
                    stored = {"cut": "", **parse_json(next(file).decode(), "it")}
                    if stored["index"] != index:
                        raise ValueError(f"it holds conversation {stored['index']}")
                    dialogue = Dialogue(uniforms=np.zeros(0), **{name: stored[name] for name in STORED})
                except (ValueError, KeyError, TypeError, StopIteration) as error:
                    raise ValueError(
                        f"{self._path} line {index + 1} is damaged ({error}); delete {self.folder} to start over"
                    ) from error
                dialogue.prompt = prompts[index] if prompts is not None else None
                yield dialogue

    def finish(self, out: Path, records: Iterable[dict[str, Any]]) -> None:
        """Write the records to ``out``, atomically, one a line.

        The bytes depend on the records only: gzip stores no time and no name.
        """
        with atomic_file(out) as partial, open(partial, "wb") as raw:
            file = gzip.GzipFile("", "wb", 9, raw, mtime=0) if out.suffix == ".gz" else raw
            for record in records:
                file.write((to_json(record) + "\n").encode())
            if file is not raw:
                file.close()

    def discard(self) -> None:
        """Delete the folder: the corpus is finished, or cannot be finished."""
        shutil.rmtree(self.folder)
        self.count = 0
