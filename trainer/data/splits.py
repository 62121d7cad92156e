"""The text of a run, split into training and held-out sequences, as every command with a run's options sees it.

    python -m trainer.data.splits --out held_out.jsonl --head mlp [any option of train.py]

writes the conversations that such a run holds out, as ShareGPT: what its score was counted on, to decode for real with
bench/run.py --prompts held_out.jsonl. Needs no Jittor, so that mistakes in the data are reported at once.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from backbone.config import read_config
from backbone.tokenizer import EMBEDDED, ChatTokenizer
from runtime.entry import Parser, run_entry
from runtime.files.documents import to_json
from trainer.config import EMBEDDED_CORPUS, TextOptions, parse
from trainer.data.conversations import Conversation, DataReport, load_conversations, share_gpt
from trainer.data.tokens import TokenizedData, check_vocabulary, encoded, load_data

SPLIT_SEED = 0  # of every run, whatever its own seed is, so that runs can be compared


@dataclass
class Splits:
    """training, held_out: tokens with their masks; report: on the text that was read; sha256: of all tokens and masks
    before the split, as hexadecimal digits; max_length: tokens that conversations were truncated to."""

    tokenizer: ChatTokenizer
    training: TokenizedData
    held_out: TokenizedData
    report: DataReport
    sha256: str
    max_length: int


def data_files(config: TextOptions) -> list[str]:
    """The files of a run: --data, or the embedded corpus."""
    return config.data or [str(EMBEDDED_CORPUS)]


def load_splits(config: TextOptions) -> Splits:
    """Read the text of a run. Raises ValueError for text that cannot be trained on."""
    backbone = read_config(Path(config.backbone) if config.backbone else EMBEDDED)
    tokenizer = config.load_tokenizer()
    tokenizer.check_fits(backbone)
    return split_text(config, tokenizer, backbone.max_positions, backbone.vocab_size)


def split_text(
    config: TextOptions, tokenizer: ChatTokenizer, max_positions: int, vocab_size: int | None = None
) -> Splits:
    """``load_splits`` with a tokenizer that is already loaded, for a backbone of ``max_positions``.

    Raises ValueError for a token outside ``vocab_size``, where that is given.
    """
    max_length = min(config.max_length, max_positions)
    data, report = load_data(
        data_files(config),
        tokenizer,
        max_length=max_length,
        block_size=min(config.block_size, max_positions),
        loss_on=config.loss_on,
        weights=config.data_weights,
    )
    if vocab_size is not None:
        check_vocabulary(data, vocab_size)
    sha256 = hashlib.sha256(data.token_ids.tobytes() + data.mask.tobytes()).hexdigest()
    try:
        split = split_held_out(data, min(config.held_out, max(1, len(data) // 10)))
    except ValueError as error:
        raise ValueError(f"{', '.join(report.files)}: {error}") from error
    return Splits(tokenizer, *split, report, sha256, max_length)


def split_held_out(data: TokenizedData, count: int, seed: int = SPLIT_SEED) -> tuple[TokenizedData, TokenizedData]:
    """(training, held out), with ``count`` conversations held out.

    The choice hashes ``seed`` and the tokens of each conversation, so it depends neither on the order of the files nor
    on what else they hold, and copies of a conversation stay on one side; the held-out part may be larger by those. It
    is scored as it is: all its weights are 1. Raises ValueError where one side would be empty.
    """
    if len(data) < 2:
        raise ValueError(
            f"there is only {len(data)} sequence to train on, and one is held out to score; expected at least 2: add "
            "data"
        )
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
    scored = data.select(np.flatnonzero(held_out))
    return data.select(np.flatnonzero(~held_out)), replace(scored, weights=np.ones(len(scored)))


def held_out_conversations(config: TextOptions, splits: Splits) -> list[Conversation]:
    """The held-out conversations, in the order of the files. Plain text has none, which raises ValueError."""
    chosen = {splits.held_out.conversation(index)[0].tobytes() for index in range(len(splits.held_out))}
    talks, _ = load_conversations(data_files(config))
    found = [
        talk
        for talk, token_ids, _ in encoded(talks, splits.tokenizer, DataReport())
        if np.array(token_ids[: splits.max_length], np.int32).tobytes() in chosen
    ]
    if not found:
        raise ValueError("the held-out part has no conversation")
    return found


def main(arguments: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m trainer.data.splits", description="Write the conversations that a run holds out.")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write, ShareGPT")
    given, rest = parser.parse_known_args(arguments)
    config = parse(rest)
    if config is None:
        raise ValueError("--list-heads is train.py's")
    splits = load_splits(config)
    print(splits.report.summary(), file=sys.stderr)
    talks = held_out_conversations(config, splits)
    with open(given.out, "w", encoding="utf-8") as file:
        for talk in talks:
            record = share_gpt(talk.messages, talk.id, talk.category)
            file.write(to_json(record) + "\n")
    print(f"{given.out}: {len(talks)} conversations", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_entry(main))
