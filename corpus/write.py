"""A training corpus that the backbone writes itself: both sides of conversations, many of them at a time.

    python -m corpus --num-conversations 100 --out corpus.jsonl.gz

A draft head has to predict what the backbone says when it decodes greedily, so the best text to train it on is the
backbone's own. The user's turns are sampled, for variety, or come from a file (--prompts); most replies are greedy.

Every conversation has its own random numbers, drawn from (seed, its index), and on the CPU the backbone's rows do not
depend on their neighbours: the file depends on neither the batch size nor the timing. So a run that was broken off,
however it was, goes on when the same command is given again, and writes the file it would have written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpus.dialogue import MAX_TURNS, OPENINGS, Prompt, Talk, Writer, new_talks
from corpus.files import MAX_LOOPS, Corpus, read_prompts, record_of
from corpus.journal import Journal, check_begun, check_writable
from corpus.lanes import NUM_CANDIDATES, Batch
from runtime.entry import Parser
from runtime.interrupt import check_interrupt, deferred_interrupts

# Jittor and the tokenizers are loaded where they are used: a mistyped option is answered at once.
if TYPE_CHECKING:
    from backbone.model import Backbone
    from backbone.tokenizer import ChatTokenizer

# Where the user's turns are sampled: most replies as the heads are measured, the others for variety.
TEMPERATURE, GREEDY_SHARE = 0.7, 0.8
# These options do not change a conversation: an unfinished corpus may go on with others.
FREE = ("batch_size", "num_tokens", "num_conversations")


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
    temperature: float | None = _option(
        None,
        f"sampling temperature of the replies, 0: greedy (default: {TEMPERATURE}, of those that --greedy-share leaves)",
        type=float,
    )
    greedy_share: float | None = _option(
        None,
        f"share of the conversations whose replies are greedy (default: {GREEDY_SHARE}, or 0 with --temperature)",
        type=float,
    )
    top_p: float = _option(
        0.95, f"sample from the likeliest tokens, at most {NUM_CANDIDATES}, that hold this much probability"
    )
    max_turns: int | None = _option(
        None,
        f"most question-answer turns of a conversation (default: {MAX_TURNS}, or all those of a prompt)",
        type=int,
    )
    continuation: float | None = _option(
        None,
        "probability of a further turn; default: as probable as the backbone thinks one is",
        flag="--continue",
        type=float,
    )
    max_length: int = _option(512, "most tokens of a conversation, template included")
    max_user_tokens: int = _option(160, "most tokens of a sampled user's turn; a longer one is not used")
    max_reply_tokens: int = _option(192, "most tokens of a reply")
    max_loops: float | None = _option(
        None,
        "most kept conversations, as a share, that end in a reply that repeats itself "
        f"(default: {MAX_LOOPS}, or 1 with --prompts)",
        type=float,
    )
    top_k_probabilities: int = _option(
        0, "also write this many likeliest next tokens of every token, with their probabilities, to FILE.top/; 0: none"
    )

    def __post_init__(self) -> None:
        if self.greedy_share is None:
            object.__setattr__(self, "greedy_share", GREEDY_SHARE if self.temperature is None else 0.0)
        if self.temperature is None:
            object.__setattr__(self, "temperature", TEMPERATURE)
        for name in ("temperature_user", "temperature"):
            self._check(name, 0 <= getattr(self, name) < float("inf"), "0 or more")
        self._check("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1")
        for name in ("greedy_share", "max_loops", "continuation"):
            value = getattr(self, name)
            self._check(name, value is None or 0 <= value <= 1, "a share between 0 and 1")
        for name in ("batch_size", "max_length", "max_user_tokens", "max_reply_tokens"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_tokens", "num_conversations", "max_turns"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "top_k_probabilities"):
            self._check(name, getattr(self, name) >= 0, "0 or more")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected {expected}")


def _flag(name: str) -> str:
    named = {f.name: f.metadata.get("flag") for f in fields(Options)}
    return named.get(name) or "--" + name.replace("_", "-")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def terms(options: Options, prompts: list[Prompt] | None) -> dict[str, Any]:
    """What decides every conversation besides the backbone and its tokenizer, by the option that sets it."""
    chosen = {_flag(name): value for name, value in dataclasses.asdict(options).items() if name not in FREE}
    asked = None if prompts is None else _digest([dataclasses.astuple(prompt) for prompt in prompts])
    return {**chosen, "--prompts": asked, "table of openings": _digest(OPENINGS) if prompts is None else None}


def write_corpus(
    backbone: Backbone, tokenizer: ChatTokenizer, options: Options, out: str | Path, prompts: list[Prompt] | None = None
) -> Corpus:
    """Write conversations to ``out`` until there are enough, or one for each prompt; returns the counts.

    A corpus that lies there unfinished is gone on with. Raises ValueError for a file that cannot be written and for an
    unfinished one that was begun on other terms, before any work, and when none of the first 1000 conversations is of
    use. Ctrl-C says how far it got.
    """
    from trainer.features.top_k import TopKWriter, top_k_folder

    out = Path(out)
    num_lanes = options.batch_size if prompts is None else min(options.batch_size, len(prompts))
    batch = Batch(backbone, Writer(tokenizer, options), num_lanes)
    models = {
        "--backbone": backbone.fingerprint,
        "weights in": backbone.storage,
        "tokenizer with --template": tokenizer.fingerprint,
    }
    with Journal(out, {**terms(options, prompts), **models}) as journal, deferred_interrupts():
        corpus, top_k = Corpus(options), None
        if options.top_k_probabilities:
            folder = journal.folder / "top"
            top_k = TopKWriter(backbone, tokenizer, options.top_k_probabilities, folder, top_k_folder(out))
        if journal.count:
            print(f"going on behind {journal.count:,} conversations of {journal.folder}", file=sys.stderr)
        progress = _Progress(corpus, batch)
        try:
            kept = []
            for talk in _talks(journal, batch, prompts):
                kept.append(corpus.keep(talk))
                if kept[-1] and top_k is not None:
                    top_k.add(talk.messages, talk.num_tokens)
                if corpus.full or (not corpus.kept and corpus.written == 1000):
                    break
                check_interrupt()
                progress.show_sometimes()
            if not corpus.kept:
                journal.discard()  # going on would not mend it
                raise ValueError(f"none of {corpus.written} conversations is of use: {dict(corpus.dropped)}")
            if top_k is not None:
                top_k.finish()
        except KeyboardInterrupt:
            rest = f"the same command goes on from {journal.folder}" if journal.count else f"{out} was not written"
            print(f"interrupted at {progress}; {rest}", file=sys.stderr)
            raise
        journal.finish(out, map(record_of, itertools.compress(journal.talks(prompts), kept)))
        if top_k is not None:
            top_k.publish()
        journal.discard()
        print(progress, file=sys.stderr)
    return corpus


def _talks(journal: Journal, batch: Batch, prompts: list[Prompt] | None) -> Iterator[Talk]:
    """The conversations that the journal holds, then those that it does not, noted there as they come."""
    yield from journal.talks(prompts)
    for talk in batch.run(new_talks(batch.writer, prompts, journal.count), journal.count):
        journal.append(talk)
        yield talk


class _Progress:
    """How far the work is, as text, and every 5 seconds on stderr."""

    def __init__(self, corpus: Corpus, batch: Batch):
        self.corpus, self.batch = corpus, batch
        self.begun = self.shown = time.perf_counter()

    def __str__(self) -> str:
        speed = self.batch.generated / (time.perf_counter() - self.begun)
        return f"{self.corpus.kept:,} conversations, {self.corpus.tokens:,} tokens kept; {speed:,.0f} tokens/s written"

    def show_sometimes(self) -> None:
        if time.perf_counter() - self.shown > 5:
            self.shown = time.perf_counter()
            print(self, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m corpus", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="JSON lines to write, gzipped if it ends in .gz; what lies unfinished in FILE.partial/ is gone on with",
    )
    parser.add_argument("--backbone", metavar="DIR", help="who writes (default: the embedded one)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="default: %(default)s")
    parser.add_argument("--load-in-8bit", action="store_true", help="keep the matrices of its layers in int8")
    parser.add_argument("--load-in-4bit", action="store_true", help="keep them in nf4")
    parser.add_argument("--template", metavar="NAME", help="chat template by name instead of the backbone's own")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="take the user's turns from this file (MT-Bench or ShareGPT), a conversation for each record, in order",
    )
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
    options, out = Options(**values), Path(given.out)
    prompts = read_prompts(given.prompts) if given.prompts else None
    check_writable(out)
    check_begun(out, terms(options, prompts))
    from backbone.model import load_backbone
    from backbone.tokenizer import load_tokenizer

    backbone = load_backbone(given.backbone, given.dtype, given.load_in_8bit, given.load_in_4bit)
    tokenizer = load_tokenizer(given.backbone, given.template)
    tokenizer.check_fits(backbone.config)
    corpus = write_corpus(backbone, tokenizer, options, out, prompts)
    print(corpus.summary())
    print(f"{out}: {out.stat().st_size:,} bytes")
    if options.top_k_probabilities:
        from trainer.features.top_k import top_k_folder

        folder = top_k_folder(out)
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes")
    return 0
