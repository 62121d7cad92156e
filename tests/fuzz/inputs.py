"""Inputs that a careless or hostile writer could make of a valid file: values of other types, numbers without measure,
nesting without end, repeated keys, half characters, and changed bytes."""

import copy
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

DEPTHS = (1, 30, 63, 64, 65, 300, 100_000)
NUMBERS = (0, -1, 1, 2, 255, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63, 2**64, 10**20, 10**40, -(10**63))
FLOATS = (0.0, -0.0, 0.5, 1.0, 1e-320, 5e-324, 1e18, 1e19, 1e300, 1.7e308, float("nan"), float("inf"), -float("inf"))
TEXTS = (
    "", " ", "x", "0", "\ud800", "\x00", "\ufeff", "\n", "../x", "/etc/passwd", "\N{SNOWMAN}",
    "step-\u00b2", "None", "true", "llama", "__class__", "\u2028", "1e400", "\udfff\ud800", "{}", "[0]",
)  # fmt: skip
LONG = "a" * 100_000
LONGEST = 1 << 24  # bytes of what is repeated
# What json.dumps does not write.
RAW = (
    "1" + "0" * 400, "-1" + "0" * 5000, "1e400", "-1e999", "1" * 65, "NaN", "-Infinity", '"\\ud800"',
    '{"a": 1, "a": 2}', "1e-400", "0.1" + "0" * 5000, '"\\u0000"', "01", "+1", "'a'", "nul", "tru", "", "/* */ 1",
    "\x00", "\x1f",
)  # fmt: skip


class Raw:
    """Text that stands in a JSON file as it is."""

    def __init__(self, text):
        self.text = text


def raws():
    """Text that only a file can hold: numbers without measure, nesting without end."""
    deep = st.sampled_from(DEPTHS).flatmap(
        lambda n: st.sampled_from(["[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, "[" * n, '[{"a":' * (n // 2)])
    )
    return st.one_of(st.sampled_from(RAW), deep).map(Raw)


def scalars():
    """Values without parts."""
    return st.one_of(
        st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.sampled_from(FLOATS),
        st.floats(allow_subnormal=False),  # kernels, in the same process, may have switched them off
        st.sampled_from(TEXTS), st.text(max_size=8), st.just(LONG), raws(),
    )  # fmt: skip


def values():
    """Any value, small."""
    keys = st.one_of(st.sampled_from(("a", "from", "value", "role", "content", "type", "")), st.text(max_size=4))
    return st.recursive(
        scalars(),
        lambda part: st.one_of(st.lists(part, max_size=4), st.dictionaries(keys, part, max_size=4)),
        max_leaves=6,
    )


@st.composite
def changed(draw, valid):
    """A copy of a JSON value with one to four of its parts replaced, removed, repeated or renamed."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 4))):
        if not isinstance(document, dict | list) or not document:
            return draw(values())
        holder = document
        while True:
            key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
            part = holder[key]
            if not isinstance(part, dict | list) or not part or draw(st.integers(0, 2)) == 0:
                break
            holder = part
        match draw(st.integers(0, 5)):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                copies = draw(st.sampled_from((1, 3, 2000)))
                copies = copies if len(written(part)) * copies < LONGEST else 3
                holder.extend(copy.deepcopy(part) for _ in range(copies))  # a later change is one of them
            case 1:
                holder[draw(st.sampled_from(TEXTS))] = part
            case 2:
                holder[key] = [part]
            case _:
                holder[key] = draw(values())
    return document


def written(document, indent=None):
    """A document as the bytes of a JSON file, half characters and all."""
    raw = []

    def marked(value):
        if isinstance(value, Raw):
            raw.append(value.text)
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(marked(document), indent=indent)
    text = re.sub('"@raw([0-9]+)@"', lambda mark: raw[int(mark[1])], text)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def bytes_changed(draw, valid):
    """A copy of some bytes with one to six edits."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from((1, 1, 2, 4, 8, 50))))
        match draw(st.integers(0, 6)):
            case 0:
                content[start:end] = b""
            case 1:
                content[start:start] = content[start:end] * draw(st.sampled_from((1, 2, 500)))
            case 2:
                content[start:end] = draw(st.binary(max_size=8))
            case 3:
                content[start : start + 8] = struct.pack("<Q", draw(st.sampled_from((0, 1, 2**31, 2**40, 2**64 - 1))))
            case 4:
                del content[start:]
            case 5:
                content[start:start] = draw(st.sampled_from((b"\xef\xbb\xbf", b"\x00", b"\xff", b"[", b"{", b'"')))
            case 6 if start < len(content):
                content[start] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


def files(documents, indent=None):
    """The bytes of a JSON file near one of these valid documents, or anything at all."""
    near = st.sampled_from(documents)
    return st.one_of(
        near.flatmap(changed).map(lambda document: written(document, indent)),
        near.flatmap(changed).map(lambda document: written(document, indent)),
        near.flatmap(lambda document: bytes_changed(written(document, indent))),
        values().map(written),
        near.map(lambda document: b"\xef\xbb\xbf" + written(document, indent)),
    )


@dataclass(frozen=True)
class Kind:
    """contents: a strategy of {file name: bytes}; read(folder): the reader and its checks."""

    contents: st.SearchStrategy
    read: Callable[[Path], object]


def one(name, strategy):
    """Contents of a single file."""
    return strategy.map(lambda content: {name: content})
