"""SentencePiece models without a tokenizer.json encode as transformers' LlamaTokenizer does."""

import json
import random
import shutil

import pytest

from backbone.tokenizer import load_tokenizer


def test_sentencepiece_models_encode_as_sentencepiece_does(sentencepiece_directory):
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    tokenizer = load_tokenizer(sentencepiece_directory, "vicuna")
    assert tokenizer.vocab_size == oracle.get_piece_size() and tokenizer.eos_ids == (2,)
    order = random.Random(1)
    letters = "theoverfxdgjumps  \n12,你\N{GRINNING FACE}"
    for _ in range(200):
        # SentencePiece adds a space even in front of one; transformers, and we with it, do not.
        text = "".join(order.choices(letters, k=order.randint(1, 40))).lstrip(" ") or "x"
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


FLAGS = [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}]
FLAGS += [{"normalized": True}, {"normalized": True, "lstrip": True}, {"special": True, "rstrip": True}]


def ids_by_both(folder, settings, count=150):
    """(ours, transformers') ids of random texts by a directory with these settings."""
    pytest.importorskip("google.protobuf")  # transformers reads SentencePiece models with it
    from transformers import AutoTokenizer

    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs, order = load_tokenizer(folder, "vicuna"), AutoTokenizer.from_pretrained(folder), random.Random(4)
    parts = [
        "the",
        " the",
        " ",
        "  ",
        "\n",
        "<x>",
        " <x> ",
        "x<x>x",
        "</s>",
        "<s>",
        " </s> ",
        "dog",
        "12",
        "你",
        "\u2581",
    ]
    texts = ["".join(order.choices(parts, k=order.randint(1, 7))) for _ in range(count)]
    return [ours.encode(text) for text in texts], [theirs.encode(text, add_special_tokens=False) for text in texts]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_added_tokens_of_sentencepiece_models_match_as_in_transformers(sentencepiece_directory, tmp_path, flags):
    folder = shutil.copytree(sentencepiece_directory, tmp_path / "m")
    token = {"content": "<x>", "special": False, "lstrip": False, "rstrip": False, "single_word": False, **flags}
    ours, theirs = ids_by_both(folder, {"added_tokens_decoder": {"330": {"normalized": False, **token}}})
    assert ours == theirs
    if {"lstrip", "rstrip", "single_word"} & flags.keys():  # the control: without them, other ids
        plain = {"content": "<x>", "special": False, "normalized": False}
        assert ids_by_both(folder, {"added_tokens_decoder": {"330": plain}})[0] != theirs


def test_prefix_spaces_of_sentencepiece_models_are_those_of_transformers(sentencepiece_directory, tmp_path):
    folder, found = shutil.copytree(sentencepiece_directory, tmp_path / "m"), {}
    for legacy in (None, True, False):
        for prefix in (None, True, False):
            settings = {"legacy": legacy, "add_prefix_space": prefix}
            found[legacy, prefix], theirs = ids_by_both(folder, settings)
            assert found[legacy, prefix] == theirs, settings
    assert found[None, None] == found[False, True] != found[True, True] != found[True, False]


def test_what_a_sentencepiece_model_never_splits_stays_whole(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the dog is over the fox", "a<sep>b the x dog"] * 60),
        model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=300, byte_fallback=True,
        user_defined_symbols=["<sep>", "<x>"], control_symbols=["<ctl>"], minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path, "vicuna")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert oracle.piece_to_id("<sep>") in tokenizer.encode("a<sep>b")
    assert tokenizer.encode("<ctl>") == [oracle.piece_to_id("<ctl>")]
    assert tokenizer.decode(tokenizer.encode("a<sep>b<ctl>")) == "a<sep>b"  # user-defined symbols are text
    ours, theirs = ids_by_both(tmp_path, {})
    assert ours == theirs


def test_a_gap_before_an_added_token_is_refused(sentencepiece_directory, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(sentencepiece_directory, folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
    with pytest.raises(ValueError, match="'<pad>' has id 400"):
        load_tokenizer(folder, "vicuna")
