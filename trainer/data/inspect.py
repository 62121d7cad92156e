"""Prints training text on the terminal, the tokens that carry loss in color, and the report on its records.

    python -m trainer.data --inspect FILE

One look tells whether a chat template and a backbone belong together. FILE is whatever a run may train on:
conversations, plain text, a datasets folder or a Parquet file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from backbone.tokenizer import ChatTokenizer
from runtime.entry import Parser
from runtime.options import add_options, option, read_options
from trainer.config import TextOptions
from trainer.data.tokens import load_data

SHARED = ("backbone", "template", "max_length", "block_size", "loss_on")  # options that training has too


@dataclass
class InspectOptions(TextOptions):
    """What to print."""

    inspect: str | None = option(None, "what to print: any kind of training text", metavar="FILE")
    count: int = option(3, "number of sequences to print", least=1)
    max_length: int = option(2048, "tokens after which a conversation is truncated", least=3)


def _colored(tokenizer: ChatTokenizer, token_ids: np.ndarray, mask: np.ndarray) -> Text:
    """The sequence as rich Text: tokens in green carry loss, tokens in gray do not."""
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), len(token_ids)]
    for start, stop in pairwise(edges):
        style = "bold green" if mask[start] else "bright_black"
        text.append(tokenizer.decode(token_ids[start:stop], skip_special_tokens=False), style=style)
    return text


def inspect(options: InspectOptions, file: Any = None) -> None:
    """Print the first sequences of a file, then the report on all of it."""
    console = Console(file=file, highlight=False)
    tokenizer = options.load_tokenizer()
    data, report = load_data(
        [options.inspect],
        tokenizer,
        max_length=options.max_length,
        block_size=options.block_size,
        loss_on=options.loss_on,
    )
    for index in range(min(options.count, len(data))):
        token_ids, mask = data.conversation(index)
        console.rule(f"{index}: {len(token_ids)} tokens, {int(mask.sum())} in the loss")
        console.print(_colored(tokenizer, token_ids, mask))
    console.rule("report")
    console.print(report.summary(), markup=False)
    for name, number in report.as_dict().items():
        if isinstance(number, int):
            console.print(f"{name:12} {number:>13,}")
    for reason, each in report.as_dict().get("left_out", {}).items():
        console.print(f"left out     {each['records']:>13,}  {reason}, first: {each['first']}", markup=False)
    for name, number in report.left_out.fields.items():
        console.print(f"unread field {number:>13,}  {name}", markup=False)


def main(arguments: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m trainer.data", description=__doc__.splitlines()[0])
    add_options(parser, InspectOptions, only=("inspect", "count", *SHARED))
    options = read_options(InspectOptions, parser.parse_args(arguments))
    if options.inspect is None:
        raise ValueError("--inspect FILE is needed: any kind of training text")
    inspect(options)
