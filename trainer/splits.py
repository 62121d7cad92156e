"""The text of a run, as every command that takes a run's options sees it. Needs no Jittor: mistakes in the data are
answered before anything is compiled or loaded.

    python -m trainer.splits --out held_out.jsonl --head mlp [any option of train.py]

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
from trainer.data import (
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
    tokens and masks before the split, as hexadecimal digits."""

    tokenizer: ChatTokenizer
    training: TokenizedData
    held_out: TokenizedData
    report: DataReport
    sha256: str


def data_files(config: TrainConfig) -> list[str]:
    """The files of a run: --data, or the embedded corpus."""
    return config.data or [str(EMBEDDED_CORPUS)]


def load_splits(config: TrainConfig) -> Splits:
    """Read the text of a run. Raises ValueError for text that cannot be trained on."""
    backbone = read_config(Path(config.backbone) if config.backbone else EMBEDDED)
    tokenizer = load_tokenizer(config.backbone, config.template)
    tokenizer.check_fits(backbone)
    data, report = load_data(
        data_files(config),
        tokenizer,
        max_length=min(config.max_length, backbone.max_positions),
        block_size=min(config.block_size, backbone.max_positions),
        loss_on=config.loss_on,
        weights=config.data_weights,
    )
    check_vocabulary(data, backbone.vocab_size)
    sha256 = hashlib.sha256(data.token_ids.tobytes() + data.mask.tobytes()).hexdigest()
    return Splits(tokenizer, *hold_out(data, config.held_out), report, sha256)


def held_out_conversations(config: TrainConfig) -> list[Conversation]:
    """The conversations that a run holds out, in the order of the files. Plain text has none.

    Raises ValueError when there are none.
    """
    splits = load_splits(config)
    chosen = {splits.held_out.conversation(index)[0].tobytes() for index in range(len(splits.held_out))}
    longest = int(max(splits.training.lengths.max(), splits.held_out.lengths.max()))
    found = []
    for talk in load_conversations(data_files(config))[0]:
        token_ids, _ = splits.tokenizer.encode_with_mask(list(talk.messages))
        cut = np.array(token_ids, np.int32)[: min(longest, config.max_length)]
        if cut.tobytes() in chosen:
            found.append(talk)
    if not found:
        raise ValueError("the held-out part has no conversation")
    return found


def main(arguments: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m trainer.splits", description="Write the conversations that a run holds out.")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write, ShareGPT")
    given, rest = parser.parse_known_args(arguments)
    config = parse(rest)
    if config is None:
        raise ValueError("--list-heads is train.py's")
    talks = held_out_conversations(config)
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    with open(given.out, "w", encoding="utf-8") as file:
        for talk in talks:
            turns = [{"from": names[m["role"]], "value": m["content"]} for m in talk.messages]
            record = {"id": talk.id, "category": talk.category, "conversations": turns}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"{given.out}: {len(talks)} conversations", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_entry(main))
