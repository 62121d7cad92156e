"""The text of a run, as every command that takes a run's options sees it. Needs no Jittor: mistakes in the data are
answered before anything is compiled or loaded.

    python -m trainer.data.splits --out held_out.jsonl --head mlp [any option of train.py]

writes the conversations that such a run holds out, as ShareGPT: what its score was counted on, to decode for real with
bench/run.py --prompts held_out.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbone.config import read_config
from backbone.tokenizer import EMBEDDED, ChatTokenizer, load_tokenizer
from runtime.entry import Parser, run_entry
from trainer.config import EMBEDDED_CORPUS, TrainConfig, parse
from trainer.data.tokens import (
    Conversation,
    DataReport,
    TokenizedData,
    check_vocabulary,
    hold_out,
    load_conversations,
    load_data,
)


@dataclass
class Splits:
    """training, held_out: tokens with their masks; report: what became of the text that was read; sha256: hash of all
    tokens and masks before the split, as hexadecimal digits; max_length: tokens that a conversation was cut at."""

    tokenizer: ChatTokenizer
    training: TokenizedData
    held_out: TokenizedData
    report: DataReport
    sha256: str
    max_length: int


def data_files(config: TrainConfig) -> list[str]:
    """The files of a run: --data, or the embedded corpus."""
    return config.data or [str(EMBEDDED_CORPUS)]


def load_splits(config: TrainConfig) -> Splits:
    """Read the text of a run. Raises ValueError for text that cannot be trained on."""
    backbone = read_config(Path(config.backbone) if config.backbone else EMBEDDED)
    tokenizer = load_tokenizer(config.backbone, config.template)
    tokenizer.check_fits(backbone)
    return split_text(config, tokenizer, backbone.max_positions, backbone.vocab_size)


def split_text(
    config: TrainConfig, tokenizer: ChatTokenizer, max_positions: int, vocab_size: int | None = None
) -> Splits:
    """The same with a tokenizer that is there already, for a backbone of ``max_positions``. Raises ValueError
    for a token outside of ``vocab_size``, where it is given."""
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
    return Splits(tokenizer, *hold_out(data, config.held_out), report, sha256, max_length)


def held_out_conversations(config: TrainConfig, splits: Splits) -> list[Conversation]:
    """The conversations of the held-out part, in the order of the files. Plain text has none.

    Raises ValueError when there are none.
    """
    chosen = {splits.held_out.conversation(index)[0].tobytes() for index in range(len(splits.held_out))}
    talks, _ = load_conversations(data_files(config))
    encoded = splits.tokenizer.encode_many_with_mask([talk.messages for talk in talks])
    found = [
        talk
        for talk, (token_ids, _) in zip(talks, encoded, strict=True)
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
    talks = held_out_conversations(config, load_splits(config))
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    with open(given.out, "w", encoding="utf-8") as file:
        for talk in talks:
            turns = [{"from": names[m["role"]], "value": m["content"]} for m in talk.messages]
            record = {"id": talk.id, "category": talk.category, "conversations": turns}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"{given.out}: {len(talks)} conversations", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_entry(main))
