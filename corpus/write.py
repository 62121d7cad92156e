"""Generates a training corpus: the backbone writes both sides of conversations, many of them at a time.

    python -m corpus --num-conversations 100 --out corpus.jsonl.gz

A draft head has to predict what the backbone generates under greedy decoding, so the backbone's own text is the best to
train it on. The user's turns are sampled, for variety, or come from a file (--prompts); most replies are greedy.

Every conversation has its own random numbers, drawn from (seed, its index), and on the CPU the backbone's rows do not
depend on their neighbors, so the file depends neither on the batch size nor on timing. An interrupted run is resumed by
the same command, and writes the file that it would have written.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbone.options import BackboneOptions
from corpus.dialogue import OPENINGS, Dialogue, Writer, new_dialogues
from corpus.journal import Journal, check_begun
from corpus.lanes import Batch
from corpus.options import Options
from corpus.selection import Selection
from runtime.atomic import check_writable
from runtime.entry import Parser
from runtime.files.documents import identity
from runtime.interrupt import check_interrupt, deferred_interrupts
from runtime.options import add_options, option_fields, read_options
from trainer.data.conversations import share_gpt
from trainer.data.prompts import Prompt, read_prompts

# Jittor and the tokenizers are loaded where they are used: a mistyped option is reported at once.
if TYPE_CHECKING:
    from backbone.model import Backbone
    from backbone.tokenizer import ChatTokenizer

HOPELESS = 1000  # conversations after which a run without a single usable one gives up


def _digest(value: Any) -> str:
    return hashlib.sha256(identity(value).encode()).hexdigest()[:16]


def terms(options: Options, prompts: list[Prompt] | None) -> dict[str, Any]:
    """What decides every conversation, besides the backbone and its tokenizer, by the option that sets it."""
    asked = [(prompt.turns, prompt.category, prompt.system) for prompt in prompts or ()]
    digest = None if prompts is None else _digest(asked)
    openings = _digest(OPENINGS) if prompts is None else None
    return {**options.by_flag(), "--prompts": digest, "table of openings": openings}


def write_corpus(
    backbone: Backbone, tokenizer: ChatTokenizer, options: Options, out: str | Path, prompts: list[Prompt] | None = None
) -> Selection:
    """Write conversations to ``out`` until there are enough, or one for each prompt; returns the counts.

    An unfinished corpus is resumed. Raises, before any work, OSError for a file that cannot be written and ValueError
    for an unfinished one that was begun with other options; ValueError also when none of the first conversations is
    usable. Ctrl-C prints how far it got.
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
        selection, top_k = Selection(options), None
        if options.top_k_probabilities:
            folder = journal.folder / "top"
            top_k = TopKWriter(backbone, tokenizer, options.top_k_probabilities, folder, top_k_folder(out))
        if journal.count:
            print(f"resuming after {journal.count:,} conversations of {journal.folder}", file=sys.stderr)
        progress = _Progress(selection, batch)
        try:
            accepted = []
            for dialogue in _dialogues(journal, batch, prompts):
                accepted.append(selection.accept(dialogue))
                if accepted[-1] and top_k is not None:
                    top_k.add(dialogue.messages, dialogue.num_tokens)
                if selection.full or (not selection.accepted and selection.generated == HOPELESS):
                    break
                check_interrupt()
                progress.show_sometimes()
            if not selection.accepted:
                journal.discard()  # resuming would not help
                raise ValueError(f"none of {selection.generated} conversations is usable: {selection.reasons()}")
            if top_k is not None:
                top_k.finish()
        except KeyboardInterrupt:
            rest = f"the same command resumes from {journal.folder}" if journal.count else f"{out} was not written"
            print(f"interrupted at {progress}; {rest}", file=sys.stderr)
            raise
        kept = itertools.compress(journal.dialogues(prompts), accepted)
        journal.finish(out, (share_gpt(d.messages, f"{d.category or 'talk'}-{d.index}", d.category) for d in kept))
        if top_k is not None:
            top_k.publish()
        journal.discard()
        print(progress, file=sys.stderr)
    return selection


def _dialogues(journal: Journal, batch: Batch, prompts: list[Prompt] | None) -> Iterator[Dialogue]:
    """The conversations in the journal, then new ones, which are stored there."""
    yield from journal.dialogues(prompts)
    for dialogue in batch.run(new_dialogues(batch.writer, prompts, journal.count), journal.count):
        journal.append(dialogue)
        yield dialogue


class _Progress:
    """How far the work is, as text, and every 5 seconds on stderr."""

    def __init__(self, selection: Selection, batch: Batch):
        self.selection, self.batch = selection, batch
        self.started = self.shown = time.perf_counter()

    def __str__(self) -> str:
        speed = self.batch.generated / (time.perf_counter() - self.started)
        selection = self.selection
        return f"{selection.accepted:,} conversations, {selection.tokens:,} tokens; {speed:,.0f} tokens/s generated"

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
        help="JSON lines to write, gzipped if it ends in .gz; an unfinished corpus in FILE.partial/ is resumed",
    )
    # The PyTorch engine has no lanes.
    add_options(parser, BackboneOptions, only=option_fields(BackboneOptions).keys() - {"backbone_engine"})
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="take the system texts and the user's turns from this file (any that bench/run.py reads), a conversation "
        "for each record, in order",
    )
    add_options(parser, Options)
    parser.add_argument(
        "--continue",
        dest="continuation",
        type=float,
        metavar="P",
        help="probability of a further turn; without: as probable as the backbone finds one",
    )
    given = parser.parse_args(arguments)
    if not given.prompts and given.num_tokens is None and given.num_conversations is None:
        raise ValueError("nothing says when to stop; pass --num-tokens, --num-conversations or --prompts")
    models, out = read_options(BackboneOptions, given), Path(given.out)
    models.check_storage()
    options = read_options(Options, given, continuation=given.continuation)
    found = read_prompts(given.prompts) if given.prompts else None
    prompts = None if found is None else list(found.prompts)
    check_writable(out)
    check_begun(out, terms(options, prompts))
    backbone, tokenizer = models.load(), models.load_tokenizer()
    tokenizer.check_fits(backbone.config)
    selection = write_corpus(backbone, tokenizer, options, out, prompts)
    print(selection.summary())
    if found is not None and any(found.dropped().values()):
        print(f"of {given.prompts} left out: {found.describe()}")
    print(f"{out}: {out.stat().st_size:,} bytes")
    if options.top_k_probabilities:
        from trainer.features.top_k import top_k_folder

        folder = top_k_folder(out)
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes")
    return 0
