"""The vocabulary of a SentencePiece model (Llama 1 and 2, Vicuna), as transformers' LlamaTokenizer takes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.files.regular import read_bytes

MOST_BYTES = 1 << 26  # of a model; a vocabulary of 256,000 pieces takes 5 MB
# Of sentencepiece_model.proto: the pieces are field 1 of the model, their type is field 3 of a piece.
PIECES, TYPE, USER_DEFINED = 1, 3, 4


def read_vocabulary(path: Path) -> dict[str, Any]:
    """The pieces by id, their merges, the tokens that are never split, and the names of the special ones.

    Control symbols are special tokens; user-defined symbols are matched as a whole and stay text. Raises ValueError
    naming the file when it is no SentencePiece model.
    """
    import sentencepiece
    from tokenizers import AddedToken

    model = read_bytes(path, MOST_BYTES)
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model; expected one, or a tokenizer.json ({error})") from error
    names = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    types = [
        dict(_fields(piece)).get(TYPE) for field, piece in _fields(pieces.serialized_model_proto()) if field == PIECES
    ]
    control = [pieces.is_control(index) for index in range(len(names))]
    whole = {name for name, kind, special in zip(names, types, control, strict=True) if special or kind == USER_DEFINED}
    mergeable = {
        name for i, name in enumerate(names) if name not in whole and not (pieces.is_unknown(i) or pieces.is_byte(i))
    }
    roles = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    return {
        "vocab": {name: index for index, name in enumerate(names)},
        "merges": _merges(names, mergeable),
        "additional_special_tokens": [
            AddedToken(name, normalized=False, special=special)
            for name, special in zip(names, control, strict=True)
            if name in whole
        ],
        **{role: names[index] for role, index in roles.items() if index >= 0},
    }


def _merges(names: list[str], mergeable: set[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that merges into a piece, the earliest piece first: SentencePiece numbers them in that
    order."""
    return [
        (name[:cut], name[cut:])
        for name in names
        if name in mergeable
        for cut in range(1, len(name))
        if name[:cut] in mergeable and name[cut:] in mergeable
    ]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a serialized protocol buffer: an integer, or the bytes of the others."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place, value, shift = place + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, message[place : place + length]
        place += length
