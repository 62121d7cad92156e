"""Training text on the terminal, the tokens that carry loss in colour.

    python -m trainer.data --inspect FILE

One look tells whether a chat template and a backbone belong together, and the report at the end what became of every
record. FILE is whatever a run may train on: conversations, plain text, a datasets folder or a Parquet file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from backbone.tokenizer import ChatTokenizer, load_tokenizer
from runtime.entry import Parser, run_entry
from trainer.config import CHOICES, TrainConfig
from trainer.data.tokens import load_data


def _coloured(tokenizer: ChatTokenizer, token_ids: np.ndarray, mask: np.ndarray) -> Text:
    """The sequence as rich Text: green carries loss, grey does not."""
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), len(token_ids)]
    for start, stop in pairwise(edges):
        style = "bold green" if mask[start] else "bright_black"
        text.append(tokenizer.decode(token_ids[start:stop], skip_special_tokens=False), style=style)
    return text


def inspect(
    path: str | Path,
    tokenizer: ChatTokenizer,
    count: int,
    max_length: int,
    block_size: int = TrainConfig.block_size,
    loss_on: str = TrainConfig.loss_on,
    file: Any = None,
) -> None:
    """Prints the first ``count`` sequences of a file with the tokens in the loss in colour, then the whole report."""
    console = Console(file=file, highlight=False)
    data, report = load_data([path], tokenizer, max_length=max_length, block_size=block_size, loss_on=loss_on)
    for index in range(min(count, len(data))):
        token_ids, mask = data.conversation(index)
        console.rule(f"{index}: {len(token_ids)} tokens, {int(mask.sum())} in the loss")
        console.print(_coloured(tokenizer, token_ids, mask))
    console.rule("report")
    console.print(report.summary(), markup=False)
    for name, number in report.as_dict().items():
        if isinstance(number, int):
            console.print(f"{name:12} {number:>13,}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for a mistake of the user's."""
    return run_entry(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    description = "Print training text, the tokens that carry loss in colour, and what became of every record."
    parser = Parser(prog="python -m trainer.data", description=description)
    parser.add_argument("--inspect", required=True, metavar="FILE", help="what to print: any kind of training text")
    parser.add_argument("--backbone", metavar="DIR", help="whose tokenizer and template (default: the embedded one)")
    parser.add_argument("--template", metavar="NAME", help="chat template by name instead of the backbone's own")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="sequences (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=2048, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument(
        "--block-size",
        type=int,
        default=TrainConfig.block_size,
        metavar="N",
        help="tokens that plain text is cut into, at most --max-length (default: %(default)s)",
    )
    parser.add_argument(
        "--loss-on", choices=CHOICES["loss_on"], default=TrainConfig.loss_on, help="(default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.count < 1:
        raise ValueError(f"--count is {options.count}, expected at least 1")
    tokenizer = load_tokenizer(options.backbone, options.template)
    inspect(options.inspect, tokenizer, options.count, options.max_length, options.block_size, options.loss_on)
