"""Vocabularies of every kind are read, and streams lose nothing."""

import dataclasses
import json
import random
import shutil
import socket

import pytest

from backbone.config import read_config
from backbone.templates import TEMPLATES
from backbone.tokenizer import EMBEDDED, StreamDecoder, load_tokenizer
from tests.backbone.chat.made import CHAT, embedded_with, masked_text, replies


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory):
    """A small SentencePiece model with Llama's settings, and no tokenizer.json."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("pieces")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "them", "then", "assistant", "user"]
    order = random.Random(0)
    (directory / "text").write_text("\n".join(" ".join(order.choices(words, k=8)) for _ in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


# Vocabularies


def test_sentencepiece_models_encode_as_sentencepiece_does(sentencepiece_directory):
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    tokenizer = load_tokenizer(sentencepiece_directory, "vicuna")
    assert tokenizer.vocab_size == oracle.get_piece_size() and tokenizer.eos_ids == (2,)
    order = random.Random(1)
    letters = "theoverfxdgjumps  \n12,你\N{GRINNING FACE}"
    for _ in range(200):
        text = "".join(order.choices(letters, k=order.randint(1, 40)))
        assert tokenizer.encode(text) == oracle.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("legacy", [True, False])
def test_only_legacy_vocabularies_mark_the_text_behind_a_special_token(sentencepiece_directory, tmp_path, legacy):
    folder = tmp_path / "m"
    shutil.copytree(sentencepiece_directory, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {"330": {"content": "<pad>", "special": True}}
    settings |= {"legacy": legacy, "added_tokens_decoder": added, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder, "vicuna")
    assert tokenizer.vocab_size == 331
    assert tokenizer.encode("<pad>") == [330]
    bare, marked = tokenizer.encode("</s>the"), tokenizer.encode("the")
    assert bare[0] == 2 and (bare[1:] == marked) is legacy


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_hold_on_a_sentencepiece_vocabulary(sentencepiece_directory, name):
    tokenizer = load_tokenizer(sentencepiece_directory, name)
    ids, mask = tokenizer.encode_with_mask(CHAT)
    # This decoder drops one space at the start of a text, and U+2581 opens the text after a special token.
    found = masked_text(tokenizer, ids, mask).replace(" ", "")
    assert found == replies(CHAT, name).replace(" ", "")


def test_a_gap_before_an_added_token_is_refused(sentencepiece_directory, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(sentencepiece_directory, folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
    with pytest.raises(ValueError, match="'<pad>' has id 400"):
        load_tokenizer(folder, "vicuna")


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
