"""Conversations on the terminal, the tokens that carry loss in colour.

    python -m trainer.data --inspect conversations.jsonl

One look tells whether a chat template and a backbone belong together.
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
from trainer.data import encode_conversations, load_conversations


def _coloured(tokenizer: ChatTokenizer, token_ids: np.ndarray, mask: np.ndarray) -> Text:
    """The conversation as rich Text: green carries loss, grey does not."""
    text = Text()
    edges = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), len(token_ids)]
    for start, stop in pairwise(edges):
        style = "bold green" if mask[start] else "bright_black"
        text.append(tokenizer.decode(token_ids[start:stop], skip_special_tokens=False), style=style)
    return text


def inspect(path: str | Path, tokenizer: ChatTokenizer, count: int, max_length: int, file: Any = None) -> None:
    """Prints the first ``count`` conversations of a file with the tokens in the loss in colour."""
    console = Console(file=file, highlight=False)
    conversations, report = load_conversations(path)
    data = encode_conversations(conversations[:count], tokenizer, max_length)
    for index in range(len(data)):
        token_ids, mask = data.conversation(index)
        console.rule(f"{index}: {len(token_ids)} tokens, {int(mask.sum())} in the loss")
        console.print(_coloured(tokenizer, token_ids, mask))
    console.print(report.summary(), markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for a mistake of the user's."""
    return run_entry(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    description = "Print conversations, the tokens that carry loss in colour."
    parser = Parser(prog="python -m trainer.data", description=description)
    parser.add_argument("--inspect", required=True, metavar="FILE", help="conversations to print")
    parser.add_argument("--backbone", metavar="DIR", help="whose tokenizer and template (default: the embedded one)")
    parser.add_argument("--template", metavar="NAME", help="chat template by name instead of the backbone's own")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="conversations (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=2048, metavar="N", help="tokens (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        raise ValueError(f"--count is {options.count}, expected at least 1")
    inspect(options.inspect, load_tokenizer(options.backbone, options.template), options.count, options.max_length)
