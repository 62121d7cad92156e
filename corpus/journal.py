"""An unfinished corpus on disk, so that a run that was broken off goes on where it was.

While FILE is written, FILE.partial/ lies beside it: ``begun.json`` says what decides the corpus, ``talks.jsonl`` has a
line for each conversation that is over, kept or not, in order. A run that is killed loses the conversations in flight
alone. They depend on the seed and their index, so they are simply begun again, and the finished file is that of a run
that was never broken off.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpus.dialogue import Prompt, Talk

BEGUN, TALKS = "begun.json", "talks.jsonl"
# Of a conversation that is over; the rest of a Talk serves while it is written.
STORED = ("index", "category", "greedy", "num_tokens", "loops", "dropped", "messages")


def partial_folder(out: Path) -> Path:
    """Where the unfinished corpus lies."""
    return out.with_name(f"{out.name}.partial")


def check_writable(out: Path) -> None:
    """Raises ValueError when ``out`` cannot be written. Leaves nothing behind."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory; expected a file, such as {out / 'corpus.jsonl.gz'}")
    folder = partial_folder(out)
    if folder.is_dir():
        return
    try:
        folder.mkdir()
        folder.rmdir()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from error


def check_begun(out: Path, terms: dict[str, Any]) -> None:
    """Raises ValueError when an unfinished ``out`` was begun on other terms, naming those that differ.

    terms: what decides the corpus, JSON-ready, by the option that sets it; a part of it is enough.
    """
    path = partial_folder(out) / BEGUN
    if not path.exists():
        return
    try:
        begun = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} to begin anew") from error
    differing = [f"{name}: {begun.get(name)}, now {value}" for name, value in terms.items() if begun.get(name) != value]
    if differing:
        raise ValueError(
            f"{path.parent} was begun on other terms: {'; '.join(differing)}; repeat the command that began it to go "
            "on, or delete the folder to begin anew"
        )


class Journal:
    """The conversations that are over. ``count``: how many of them; ``folder``: where they lie.

    As a context it ends with the folder closed, or gone if it holds no conversation. One process at a time has it.
    """

    def __init__(self, out: Path, terms: dict[str, Any]):
        """Begin ``out``, or go on with it. Raises ValueError when it cannot be written, when it was begun on other
        terms (see ``check_begun``) and while another process writes it."""
        check_writable(out)
        self.folder = partial_folder(out)
        self.folder.mkdir(exist_ok=True)
        self._path = self.folder / TALKS
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed in __exit__
        try:
            self._lock()
            check_begun(out, terms)
            if not (self.folder / BEGUN).exists():
                self._file.truncate(0)
                replace_text(self.folder / BEGUN, json.dumps(terms, indent=2) + "\n")
            self.count = self._recover()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.count:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process that ends, however it does, lets go
        except BlockingIOError as error:
            raise ValueError(
                f"another process is writing {self.folder}; wait for it or choose another --out"
            ) from error

    def _recover(self) -> int:
        """Cut off a last line that was not written whole; returns the number of lines."""
        count = end = 0
        with open(self._path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                count, end = count + 1, end + len(line)
        self._file.truncate(end)
        return count

    def append(self, talk: Talk) -> None:
        """Note a conversation; when this returns, no end of the process can take it back."""
        assert talk.index == self.count, (talk.index, self.count)
        line = json.dumps({name: getattr(talk, name) for name in STORED}, ensure_ascii=False) + "\n"
        left = line.encode()
        while left:
            left = left[self._file.write(left) :]
        self.count += 1

    def talks(self, prompts: list[Prompt] | None) -> Iterator[Talk]:
        """The conversations as they were when they were over. Raises ValueError for a damaged file."""
        with open(self._path, "rb") as file:
            for index in range(self.count):
                try:
                    stored = json.loads(next(file))
                    if stored["index"] != index:
                        raise ValueError(f"conversation {stored['index']} stands there")
                    talk = Talk(uniforms=np.zeros(0), **{name: stored[name] for name in STORED})
                except (ValueError, KeyError, TypeError, StopIteration) as error:
                    raise ValueError(
                        f"{self._path} line {index + 1} is damaged ({error}); delete {self.folder} to begin anew"
                    ) from error
                talk.questions = prompts[index].turns if prompts is not None else None
                yield talk

    def finish(self, out: Path, records: Iterable[dict[str, Any]]) -> None:
        """Write the records to ``out``, whole or not at all."""
        write_lines(self.folder / "finished", records, zipped=out.suffix == ".gz")
        os.replace(self.folder / "finished", out)

    def discard(self) -> None:
        """Delete the folder: the corpus is finished, or will never be."""
        shutil.rmtree(self.folder)
        self.count = 0


def write_lines(path: Path, records: Iterable[dict[str, Any]], zipped: bool) -> None:
    """One record a line. The bytes depend on the records alone: gzip stores no time and no name."""
    with open(path, "wb") as raw:
        file = gzip.GzipFile("", "wb", 9, raw, mtime=0) if zipped else raw
        for record in records:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        if zipped:
            file.close()


def replace_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(text)
    os.replace(partial, path)
