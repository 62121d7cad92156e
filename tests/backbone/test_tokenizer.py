"""Vocabularies of every kind are read, and streams lose nothing."""

import dataclasses
import json
import os
import random
import shutil
import socket

import pytest

from backbone.config import read_config
from backbone.templates import TEMPLATES
from backbone.tokenizer import EMBEDDED, StreamDecoder, load_tokenizer
from tests.backbone.chat.made import CHAT, SYSTEM, embedded_with, masked_text, replies

# Vocabularies


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_hold_on_a_sentencepiece_vocabulary(sentencepiece_directory, name):
    tokenizer = load_tokenizer(sentencepiece_directory, name)
    ids, mask = tokenizer.encode_with_mask(CHAT)
    # This decoder drops one space at the start of a text, and U+2581 opens the text after a special token.
    found = masked_text(tokenizer, ids, mask).replace(" ", "")
    assert found == replies(CHAT, name).replace(" ", "")


def test_unreadable_tokenizers_are_refused_with_their_path(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path, "vicuna")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path, "vicuna")


def test_replies_end_at_the_tokens_of_the_config_without_a_generation_config(tmp_path):
    folder = embedded_with(tmp_path / "ends")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for ends, expected in (([2, 16], (2, 16)), (16, (2, 16)), (None, (2,))):
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
        assert load_tokenizer(folder).eos_ids == expected  # the vocabulary's own end comes first
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [16]}))
    assert load_tokenizer(folder).eos_ids == (2, 16)


def test_half_a_character_is_refused_by_the_message_that_holds_it():
    for messages in ([{"role": "user", "content": "nice \ud83d"}], [*SYSTEM, {"role": "user", "content": "\ude00"}]):
        with pytest.raises(ValueError, match=f"message {len(messages) - 1} holds half a character"):
            load_tokenizer().encode_chat(messages)


def test_a_tokenizer_must_fit_the_backbone(tmp_path):
    config = read_config(EMBEDDED)
    load_tokenizer().check_fits(config)
    load_tokenizer().check_fits(dataclasses.replace(config, vocab_size=5000))
    larger = load_tokenizer(embedded_with(tmp_path / "larger", pad="<pad>"))
    with pytest.raises(ValueError, match=r"4097 tokens .* backbone 4096"):
        larger.check_fits(config)
    folder = embedded_with(tmp_path / "ends")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9999]}')
    with pytest.raises(ValueError, match="9999"):
        load_tokenizer(folder).check_fits(config)


def test_fingerprints_cover_vocabulary_and_template(tmp_path):
    own = load_tokenizer().fingerprint
    assert own == load_tokenizer(EMBEDDED).fingerprint and len(own) == 16
    larger = load_tokenizer(embedded_with(tmp_path / "larger", pad="<pad>")).fingerprint
    assert len({own, larger, *(load_tokenizer(template=name).fingerprint for name in TEMPLATES)}) == 2 + len(TEMPLATES)


def test_loading_touches_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_tokenizer()


# Streams


def assert_streams(tokenizer, ids, order):
    for skip in (True, False):
        decoder = StreamDecoder(tokenizer, skip)
        pieces, start = [], 0
        while start < len(ids):
            size = order.randint(1, 3)
            pieces.append(decoder.push(ids[start : start + size]))
            start += size
        pieces.append(decoder.finish())
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert decoder.finish() == ""


def test_streams_show_whole_characters_and_lose_nothing(sentencepiece_directory):
    order = random.Random(2)
    text = "naïve 你好, \N{GRINNING FACE}\N{GRINNING FACE} done"
    for tokenizer in (load_tokenizer(), load_tokenizer(sentencepiece_directory, "vicuna")):
        ids = tokenizer.encode(text)
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push([token]) for token in ids]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert "".join(pieces) + decoder.finish() == text
        assert len([piece for piece in pieces if piece]) > 5  # it does stream
        # The control: token by token, the plain decoder does break characters.
        assert any("\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token]) for token in ids)
        assert_streams(tokenizer, ids, order)


def test_streams_of_random_tokens_lose_nothing(sentencepiece_directory):
    order = random.Random(3)
    for tokenizer in (load_tokenizer(), load_tokenizer(sentencepiece_directory, "vicuna")):
        for _ in range(200):
            top = order.choice([tokenizer.vocab_size, 260])  # the low ids are mostly single bytes
            assert_streams(tokenizer, [order.randrange(top) for _ in range(order.randint(0, 20))], order)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "chat_template.jinja"])
def test_files_of_a_tokenizer_are_regular_ones(tmp_path, name):
    for given in ("tokenizer.json", "chat_template.jinja"):
        if (given, name) != ("tokenizer.json", "tokenizer.model"):
            shutil.copy(EMBEDDED / given, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)  # reading it would wait for ever
    with pytest.raises(ValueError, match=f"{name} is a pipe, expected a regular file"):
        load_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path)
