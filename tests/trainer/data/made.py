"""Records and sequences made for tests."""

import json
from itertools import pairwise

import numpy as np

from trainer.data.tokens import TokenizedData


def talk(*turns):
    """A ShareGPT record: "h:..." is the human's, "g:..." gpt's, "s:..." the system's."""
    names = {"h": "human", "g": "gpt", "s": "system"}
    return {"id": "x", "conversations": [{"from": names[turn[0]], "value": turn[2:]} for turn in turns]}


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_talks(path, count):
    """Conversations of two questions that differ in a word each: copies would all be on one side of the split."""
    return write_lines(
        path,
        *(
            {**talk(*[f"h:What follows {index}?", f"g:That is {index + 1}, and then {index + 2}."] * 2), "id": index}
            for index in range(count)
        ),
    )


GOOD = talk("h:Hi", "g:Hello")
MESSAGES = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


def numbered(lengths, first=0, weights=None):
    """Conversations of these lengths, every token different, all the assistant's."""
    starts = np.cumsum([first, *lengths])
    return TokenizedData.of(((np.arange(a, b), np.ones(b - a, bool)) for a, b in pairwise(starts)), weights)


def conversations_of(data):
    return [tuple(data.conversation(index)[0].tolist()) for index in range(len(data))]
