"""A training corpus that the backbone writes itself: both sides of conversations, many of them at a time.

    python -m trainer.distill --num-conversations 100 --out corpus.jsonl.gz

A draft head has to predict what the backbone says when it decodes greedily, so the best text to train it on is the
backbone's own. The user's turns are sampled, for variety, or come from a file; most replies are greedy.

Every conversation has its own random numbers, drawn from (seed, its index), and on the CPU the backbone's rows do not
depend on their neighbours: the file depends on neither the batch size nor the timing.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.entry import Parser, run_entry
from runtime.interrupt import check_interrupt, deferred_interrupts
from trainer.dialogue import Prompt, Talk, Writer, new_talks
from trainer.lanes import Batch

# Jittor and the tokenizers are loaded where they are used: a mistyped option is answered at once.
if TYPE_CHECKING:
    from backbone.model import Backbone
    from backbone.tokenizer import ChatTokenizer


def _option(default, text: str, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Options:
    """What decides the corpus, besides the backbone. Raises ValueError for values that make no sense."""

    num_tokens: int | None = _option(None, "stop when the kept conversations hold this many tokens", type=int)
    num_conversations: int | None = _option(None, "stop when this many conversations are kept", type=int)
    batch_size: int = _option(64, "conversations written at a time; does not change the result")
    seed: int = _option(0, "every choice is drawn from it")
    temperature_user: float = _option(0.8, "sampling temperature of the user's turns")
    temperature: float = _option(0.7, "sampling temperature of the replies that are not greedy")
    greedy_share: float = _option(0.8, "share of the conversations whose replies are greedy")
    top_p: float = _option(0.95, "sample from the likeliest tokens that hold this much probability")
    max_turns: int = _option(4, "most question-answer turns of a conversation")
    continuation: float | None = _option(
        None,
        "probability of a further turn; default: as probable as the backbone thinks one is",
        flag="--continue",
        type=float,
    )
    max_length: int = _option(512, "most tokens of a conversation, template included")
    max_user_tokens: int = _option(160, "most tokens of a user's turn; a longer one is not used")
    max_reply_tokens: int = _option(192, "most tokens of a reply")
    max_loops: float = _option(0.04, "most kept conversations, as a share, that end in a reply that repeats itself")

    def __post_init__(self) -> None:
        for name in ("temperature_user", "temperature"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1")
        for name in ("greedy_share", "max_loops"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a share between 0 and 1")
        self._check("continuation", self.continuation is None or 0 <= self.continuation <= 1, "between 0 and 1")
        for name in ("batch_size", "max_turns", "max_length", "max_user_tokens", "max_reply_tokens"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_tokens", "num_conversations"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        self._check("seed", self.seed >= 0, "0 or more")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected {expected}")


def _flag(name: str) -> str:
    named = {f.name: f.metadata.get("flag") for f in fields(Options)}
    return named.get(name) or "--" + name.replace("_", "-")


# Files ----------------------------------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a JSON list or JSON lines: ``turns`` as in MT-Bench, or the user's turns of ``conversations``.

    Raises ValueError for a file that holds none.
    """
    from trainer.data import ROLES, records

    prompts = []
    for line, record in records(Path(path)):
        where = f"{path} line {line}"
        if not isinstance(record, dict):
            raise ValueError(f"{where}: got a {type(record).__name__}, expected an object with turns or conversations")
        turns = record.get("turns")
        if turns is None:
            said = record.get("conversations", record.get("messages")) or []
            said = [t for t in said if ROLES.get(t.get("from", t.get("role"))) == "user"]
            turns = [t.get("value", t.get("content")) for t in said]
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{where}: expected a list of texts under turns, or conversations")
        turns = tuple(turn.strip() for turn in turns if turn.strip())
        if turns:
            prompts.append(Prompt(turns, str(record.get("category", ""))))
    if not prompts:
        raise ValueError(f"{path} holds no user's turn; expected turns or conversations")
    return prompts


class Corpus:
    """What is kept, what is not and why, and the numbers of the report."""

    def __init__(self, options: Options):
        self.options = options
        self.dropped: Counter[str] = Counter()
        self.kinds: dict[str, Counter[str]] = {}
        self.replies: Counter[str] = Counter()
        self.seen: set[tuple[str, ...]] = set()
        self.written = self.kept = self.tokens = self.loops = self.greedy = 0

    def keep(self, talk: Talk) -> bool:
        """Count the conversation; False when it is not to be kept."""
        self.written += 1
        reason = talk.dropped or self._refuse(talk)
        if reason:
            self.dropped[reason] += 1
            return False
        self.kept += 1
        self.tokens += talk.num_tokens
        self.loops += talk.loops
        self.greedy += talk.greedy
        kind = self.kinds.setdefault(talk.category, Counter())
        kind.update(conversations=1, turns=talk.num_turns, tokens=talk.num_tokens)
        self.replies.update(m["content"] for m in talk.messages if m["role"] == "assistant")
        return True

    def _refuse(self, talk: Talk) -> str:
        asked = [m["content"].casefold() for m in talk.messages if m["role"] == "user"]
        key = tuple(asked) if talk.questions is not None else (asked[0],)
        if key in self.seen:
            return "same opening as an earlier one"
        if talk.loops and self.loops + 1 > self.options.max_loops * (self.kept + 1):
            return "reply in a loop"
        self.seen.add(key)
        return ""

    @property
    def full(self) -> bool:
        """Enough is kept."""
        o = self.options
        return (o.num_tokens is not None and self.tokens >= o.num_tokens) or (
            o.num_conversations is not None and self.kept >= o.num_conversations
        )

    def summary(self) -> str:
        """The report, several lines."""
        turns = sum(kind["turns"] for kind in self.kinds.values())
        repeated = 1 - len(self.replies) / max(1, turns)
        lines = [
            f"{self.kept:,} conversations, {turns:,} turns, {self.tokens:,} tokens; {self.greedy:,} with greedy "
            f"replies, {self.loops:,} end in a loop, {repeated:.1%} of the replies repeat an earlier one",
            f"{'kind':12} {'conversations':>13} {'turns':>8} {'tokens':>10} {'share':>6}",
        ]
        for name, kind in sorted(self.kinds.items()):
            share = kind["tokens"] / self.tokens
            lines.append(
                f"{name or '-':12} {kind['conversations']:13,} {kind['turns']:8,} {kind['tokens']:10,} {share:6.1%}"
            )
        lost = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common()) or "none"
        return "\n".join([*lines, f"dropped {self.dropped.total():,} of {self.written:,}: {lost}"])


def record_of(talk: Talk) -> dict[str, Any]:
    """The conversation as a ShareGPT record, with its kind."""
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in talk.messages]
    return {"id": f"{talk.category or 'talk'}-{talk.index}", "category": talk.category, "conversations": turns}


def _temporary(path: Path) -> tuple[int, str]:
    """An open file beside ``path``, and its name."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a directory; expected a file, such as {path / 'corpus.jsonl.gz'}")
    try:
        return tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}") from error


def check_writable(path: Path) -> None:
    """Raises ValueError when ``path`` cannot be written."""
    handle, temporary = _temporary(path)
    os.close(handle)
    os.unlink(temporary)


@contextlib.contextmanager
def atomic_lines(path: Path) -> Iterator[Any]:
    """A function that writes one record a line, gzipped for a name in .gz; the file appears once all is well.

    The bytes depend on the records alone: no time and no name are stored. Raises ValueError when the folder takes no
    new file.
    """
    handle, temporary = _temporary(path)
    try:
        with open(handle, "wb") as raw:
            zipped = path.suffix == ".gz"
            file = gzip.GzipFile("", "wb", 9, raw, mtime=0) if zipped else raw
            yield lambda record: file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            if zipped:
                file.close()
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp lets nobody else read it
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_corpus(
    backbone: Backbone, tokenizer: ChatTokenizer, options: Options, out: str | Path, prompts: list[Prompt] | None = None
) -> Corpus:
    """Write conversations to ``out`` until there are enough, or one for each prompt; returns the counts.

    Raises ValueError for a file that cannot be written, before any work, and when none of the first 1000
    conversations is of use. Ctrl-C says how far it got and leaves no file.
    """
    corpus = Corpus(options)
    with atomic_lines(Path(out)) as write, deferred_interrupts():
        batch = Batch(backbone, Writer(tokenizer, options))
        begun = said = time.perf_counter()

        def progress() -> str:
            speed = batch.generated / (time.perf_counter() - begun)
            return f"{corpus.kept:,} conversations, {corpus.tokens:,} tokens kept; {speed:,.0f} tokens/s written"

        try:
            for talk in batch.run(new_talks(batch.writer, prompts)):
                if corpus.keep(talk):
                    write(record_of(talk))
                elif not corpus.kept and corpus.written == 1000:
                    raise ValueError(f"none of 1000 conversations is of use: {dict(corpus.dropped)}")
                if corpus.full:
                    break
                check_interrupt()
                if time.perf_counter() - said > 5:
                    said = time.perf_counter()
                    print(progress(), file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(f"interrupted at {progress()}; {out} was not written", file=sys.stderr)
            raise
        if not corpus.kept:
            raise ValueError(f"none of {corpus.written} conversations is of use: {dict(corpus.dropped)}")
        print(progress(), file=sys.stderr)
    return corpus


def main(arguments: list[str]) -> int:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m trainer.distill", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write; gzipped if it ends in .gz")
    parser.add_argument("--backbone", metavar="DIR", help="who writes (default: the embedded one)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="default: %(default)s")
    parser.add_argument("--template", metavar="NAME", help="chat template by name instead of the backbone's own")
    parser.add_argument("--prompts", metavar="FILE", help="take the user's turns from this file (MT-Bench or ShareGPT)")
    for f in fields(Options):
        kind = f.metadata.get("type", type(f.default))
        shown = "" if f.default is None else f" (default: {f.default})"
        parser.add_argument(
            _flag(f.name), dest=f.name, type=kind, default=f.default, metavar="N", help=f.metadata["help"] + shown
        )
    given = parser.parse_args(arguments)
    values = {f.name: getattr(given, f.name) for f in fields(Options)}
    if not given.prompts and values["num_tokens"] is None and values["num_conversations"] is None:
        raise ValueError("nothing says when to stop; pass --num-tokens, --num-conversations or --prompts")
    options = Options(**values)
    prompts = read_prompts(given.prompts) if given.prompts else None
    check_writable(Path(given.out))
    from backbone.model import load_backbone
    from backbone.tokenizer import load_tokenizer

    backbone = load_backbone(given.backbone, given.dtype)
    tokenizer = load_tokenizer(given.backbone, given.template)
    tokenizer.check_fits(backbone.config)
    corpus = write_corpus(backbone, tokenizer, options, given.out, prompts)
    print(corpus.summary())
    print(f"{given.out}: {Path(given.out).stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
