"""Files to records: JSON lists and lines, gzipped or not, and the tables of ``trainer.data.parquet``.

What a record means is decided by ``trainer.data.turns``.
"""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from runtime.files.documents import parse_json
from runtime.files.regular import open_regular, unpacked
from trainer.data.parquet import is_table, read_rows

CHUNK_BYTES = 1 << 20  # read at a time
UNFINISHED = ("{", "[", ",", ":")  # a line that ends so is not a complete record
TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')  # which JSON does not break across lines


def read_text(path: Path) -> Iterator[str]:
    """The text of a file, gzipped or not, piece by piece, with its line ends unchanged and without a byte order mark.

    Raises ValueError for a file that cannot be read, and naming the first byte that is not UTF-8.
    """
    decoder, taken = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        with open_regular(path) as file:
            stream = unpacked(file, path)
            while piece := stream.read(CHUNK_BYTES):
                taken += len(piece)
                yield decoder.decode(piece)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = taken - len(error.object) + error.start
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {place}; expected text or JSON") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def located_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of JSON lines, a JSON list, a datasets folder or a Parquet file.

    ``where`` names the file and the line, item (counted from 0) or row. JSON lines and tables are read on demand; an
    object may take several lines, as pretty-printers write it. Raises ValueError naming the file and the line where
    JSON is broken.
    """
    if is_table(path):
        yield from ((f"{path} row {row}", record) for row, record in read_rows(path))
        return
    pieces, start, first_line = read_text(Path(path)), "", 1
    for piece in pieces:
        if piece.strip():
            start = piece
            break
        first_line += piece.count("\n")
    if start.lstrip().startswith("["):
        items = parse_json(start + "".join(pieces), path, first_line)
        yield from ((f"{path} item {number}", record) for number, record in enumerate(items))
        return
    lines = enumerate(_lines(chain([start], pieces)), start=first_line)
    for number, line in lines:
        if line.strip():
            text = _whole_object(line, lines) if line.rstrip().endswith(UNFINISHED) else line
            yield f"{path} line {number}", parse_json(text, path, number)


def _whole_object(opening: str, lines: Iterator[tuple[int, str]]) -> str:
    """A pretty-printed object: the line that opens it, and those up to the one that closes as many brackets."""
    parts, depth = [opening], _opened(opening)
    while depth > 0 and (following := next(lines, None)):
        parts.append(following[1])
        depth += _opened(following[1])
    return "\n".join(parts)


def _opened(line: str) -> int:
    """How many more brackets a line opens than it closes, outside of texts."""
    bare = TEXT.sub("", line)
    return sum(map(bare.count, "{[")) - sum(map(bare.count, "}]"))


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines of a text. splitlines() would also break at characters such as U+2028, which JSON may contain."""
    rest = ""
    for piece in pieces:
        *complete, rest = (rest + piece).split("\n")
        yield from complete
    yield rest
