"""Blocks decode to their text, windows give the tokens of all of it, and files of all kinds can be mixed."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from backbone.templates import named_template
from backbone.tokenizer import EMBEDDED, ChatTokenizer, load_tokenizer
from tests.trainer.data.made import GOOD, write_lines
from trainer.data import records
from trainer.data.conversations import DataReport
from trainer.data.plain_text import CONTEXT, Window, _meet, pack, read_blocks, read_texts, text_tokens, windows
from trainer.data.tokens import TokenizedData, check_vocabulary, is_text_file, load_data

# The pre-tokenizer of Llama 3: line breaks belong to the punctuation before them.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def chat(backend):
    """A tokenizer with Llama's special tokens and the Vicuna template."""
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return ChatTokenizer(fast, named_template("vicuna"), b"")


def byte_level(pre_tokenizer=None):
    """The embedded vocabulary with tokens for two line breaks and for a full stop with one."""
    content = json.loads((EMBEDDED / "tokenizer.json").read_text())
    for left, right in (("Ċ", "Ċ"), (".", "Ċ"), (".Ċ", "Ċ")):
        content["model"]["vocab"][left + right] = len(content["model"]["vocab"])
        content["model"]["merges"].append([left, right])
    backend = Tokenizer.from_str(json.dumps(content))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return chat(backend)


def sentencepiece(legacy, *merges):
    """A vocabulary in the manner of Llama 2: byte tokens, spaces as U+2581, one in front of every text."""
    merges = [("▁", "a"), ("▁a", "b"), ("b", "c"), ("▁", "▁"), ("▁▁", "▁▁"), *merges]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcd.\n"]
    vocab = {name: index for index, name in enumerate(dict.fromkeys([*names, *(a + b for a, b in merges)]))}
    if not any("\n" in "".join(merge) for merge in merges):
        del vocab["\n"]
        vocab = {name: index for index, name in enumerate(vocab)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[:3]])
    return chat(backend)


TOKENIZERS = {
    "embedded": load_tokenizer(),
    "byte-level": byte_level(),
    "llama-3": byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES])),
    "llama-2": sentencepiece(legacy=True),
    "llama-2, prefix at the start alone": sentencepiece(legacy=False),
    # Tokens that cross seams: no vocabulary of the family has such, and the tokens are right all the same.
    "crossing": sentencepiece(True, ("\n", "a"), ("\n", "b"), ("c", "▁"), ("d", "▁a")),
}


def laid(arrays):
    return np.concatenate([np.zeros(0, np.int32), *arrays]).tolist()


def tokens_of(text, tokenizer, size=4, context=CONTEXT, cut=7):
    """Tokens of a text that arrives ``cut`` characters at a time."""
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    return laid(text_tokens([pieces], tokenizer, size, context))


# Windows


def test_windows_of_a_text_by_hand():
    assert list(windows(["ab\nc", "d ef"], size=3, context=2)) == [
        Window("ab\ncd", first=0, last=3, opens=True),
        Window("b\ncd ef", first=2, last=7, opens=False),
    ]
    # No line begins in reach: the first space between words. A text without either is one window.
    assert [w.text[w.first : w.last] for w in windows(["abcdef gh  ij kl"], 3, 2)] == ["abcdef", " gh  ij kl"]
    assert [w.text[w.first : w.last] for w in windows("x" * 50, 3, 2)] == ["x" * 50]
    assert list(windows([], 3, 2)) == [Window("", 0, 0, True)]


SEAMS = (
    "one.\n\nTwo  three\n\n\n  four 55555 \r\n\r\n. . ab\n\tc d\na bab\n\n\n\nd.\n\n語é \N{GRINNING FACE}\n"
    "ab</s>\n a b c\nb c ab ab\n"
)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_windows_give_the_tokens_of_the_complete_text(name):
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=60)
    @given(st.text("ab.c d\n\r\t1é", max_size=160), st.integers(1, 12), st.integers(1, 200))
    @example("", 1, 1)
    @example(SEAMS * 3, 1, 1000)
    @example(SEAMS * 3, 5, 3)
    @example(SEAMS.replace("</s>", "") * 3, 5, 3)
    def check(text, size, cut):
        ids = tokens_of(text, tokenizer, size, cut=cut)
        assert ids == tokenizer.encode(text)
        # A vocabulary of Llama 2 cannot restore these: a space after a special token that is spelled
        # out is one too many, and one that opens a text stands for the prefix.
        if "</s>" not in text and not text.startswith(" "):
            assert tokenizer.decode(ids, skip_special_tokens=False) == text

    check()


@pytest.mark.parametrize("name", ["byte-level", "llama-2", "llama-2, prefix at the start alone"])
def test_windows_without_overlap_do_not(name):
    """The control: encoded by themselves, windows take line ends for text ends and get a space in front."""
    tokenizer = TOKENIZERS[name]
    assert tokens_of(SEAMS, tokenizer) == tokenizer.encode(SEAMS)
    assert tokens_of(SEAMS, tokenizer, context=0) != tokenizer.encode(SEAMS)


def test_windows_that_disagree_at_their_seam_are_encoded_together():
    """Two lines make a token, and which two depends on the first line of all: an overlap of 32 lines cannot tell."""
    tokenizer = sentencepiece(True, ("a", "\n"), ("a\n", "a\n"))
    text = "b\n" + "a\n" * 200
    # Tokens of the complete text end at 6, 10, .. 70, 74; those of an overlap from 6 on, whose first letter is one with
    # the prefix, at 8, 12, .. 68, 72, and of one from 8 on at 10, .. 70, 74.
    for size, agree in ((70, False), (72, True)):
        first, second, *_ = [(w, tokenizer._backend.encode(w.text)) for w in windows([text], size)]
        assert first[0].last == size and _meet(*first, *second) == agree
        assert tokens_of(text, tokenizer, size) == tokenizer.encode(text)


def test_texts_have_the_end_token_between_them(tokenizer, monkeypatch):
    ab, c = tokenizer.encode("a b\nc"), tokenizer.encode("c")
    texts = [["a b", "\nc"], ["c"], ["a b\nc"]]
    assert laid(text_tokens(texts, tokenizer, size=1)) == [*ab, 2, *c, 2, *ab]
    assert laid(text_tokens([], tokenizer)) == []
    monkeypatch.setattr(tokenizer, "eos_ids", ())  # a vocabulary without one
    assert laid(text_tokens(texts, tokenizer, size=1)) == [*ab, *c, *ab]


# Blocks


def test_blocks_by_hand():
    def blocks(*arrays, size=4, bos=1):
        return [block.tolist() for block in pack((np.array(a, np.int32) for a in arrays), size, bos)]

    assert blocks([5, 6, 7, 8, 9], [10, 11]) == [[1, 5, 6, 7], [1, 8, 9, 10]]  # 11 alone is too few
    assert blocks([5, 6, 7, 8, 9]) == [[1, 5, 6, 7], [1, 8, 9]]
    assert blocks([5, 6, 7, 8, 9, 10, 11], bos=None) == [[5, 6, 7, 8], [9, 10, 11]]
    assert blocks([5, 6, 7, 8, 9, 10], bos=None) == [[5, 6, 7, 8]]
    assert blocks([5], bos=1) == [] == blocks()


@pytest.mark.parametrize("name", ["novel.txt", "novel.txt.gz", "NOVEL.TXT", "wiki.train.raw"])
def test_decoding_the_blocks_of_a_file_gives_its_text(tmp_path, monkeypatch, tokenizer, name):
    monkeypatch.setattr(records, "CHUNK_BYTES", 5)  # cuts characters in two
    text = "\n = Title = \r\n\nWords, 12 @-@ 3 words. Ünïcödé 語\N{GRINNING FACE}.\n" * 9
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    data, report = load_data([tmp_path / name], tokenizer, max_length=64, block_size=16)
    inside = [data.conversation(index) for index in range(len(data))]
    assert tokenizer.decode([token for ids, _ in inside for token in ids[1:]], skip_special_tokens=False) == text
    assert all(ids[0] == 1 and not mask[0] and mask[1:].all() for ids, mask in inside)
    assert set(data.lengths[:-1]) == {16} and report.blocks == len(data) and report.rest_tokens == 0
    assert report.summary().startswith(f"{len(data)} blocks of 1 text from {name}; {len(data.token_ids)} tokens, ")
    shorter, _ = load_data([tmp_path / name], tokenizer, max_length=8, block_size=16)
    assert set(shorter.lengths[:-1]) == {8}  # no longer than other sequences


def test_a_vocabulary_without_beginning_token_fills_the_blocks_with_text(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "a.txt").write_text("abcdefgh")
    monkeypatch.delitem(tokenizer._special, "bos_token")
    blocks = list(read_blocks(tmp_path / "a.txt", tokenizer, 3, report := DataReport()))
    ids = tokenizer.encode("abcdefgh")
    assert laid(block for block, _ in blocks) == ids[: len(ids) - report.rest_tokens] and len(ids) > 3
    assert all(mask.all() for _, mask in blocks)


def test_records_with_text_are_joined_and_counted(tmp_path, tokenizer):
    texts = ["One text.", " ", "Another,\nof two lines.", None, "half \ud83d", ""]
    for name, content in (
        ("d.jsonl", "\n".join(json.dumps({"text": text, "id": 1}) for text in texts)),
        ("d.json", json.dumps([{"text": text} for text in texts])),
    ):
        (tmp_path / name).write_text(content)
        data, report = load_data([tmp_path / name], tokenizer, max_length=64, block_size=64)
        assert data.token_ids.tolist() == [1, *tokenizer.encode(texts[0]), 2, *tokenizer.encode(texts[2])]
        assert data.mask.tolist() == [False] + [True] * (len(data.token_ids) - 1)
        assert (report.read, report.texts, report.blank, report.malformed, report.blocks) == (6, 6, 3, 1, 1)
        assert report.summary().startswith(f"1 blocks of 6 texts from {name}; dropped 3 blank, 1 malformed; ")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "no usable text in .*a.txt: 1 read, 1 blank"),
        ("a.txt", b"x", "a.txt holds 1 tokens of text, too few for a block; expected at least 3"),
        ("a.txt", b"12345\xff6", "a.txt is not UTF-8 text: invalid start byte at byte 5"),
        ("a.txt", b"12345\xe8\xaa", "a.txt is not UTF-8 text: unexpected end of data at byte 5"),
        ("a.txt.gz", gzip.compress(b"text" * 100)[:-9], "a.txt.gz cannot be read"),
        ("a.jsonl", b"", "a.jsonl is empty; expected records with conversations, messages or text"),
        ("a.jsonl", b'{"text": ["a"]}', r"1 malformed: a list instead of a text \(1, first in a.jsonl line 1\)"),
        ("a.jsonl", b'{"text": null}\n{"text": " "}', "no usable text in .*a.jsonl: 2 read, 2 blank"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "no usable text in .*a.jsonl: 1 read, 0 blank, 1 malformed"),
    ],
)
def test_files_without_text_are_refused_by_name(tmp_path, monkeypatch, tokenizer, name, content, complaint):
    monkeypatch.setattr(records, "CHUNK_BYTES", 2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        load_data([tmp_path / name], tokenizer, max_length=64, block_size=64)


# Files of every kind


@pytest.fixture
def mixed(tmp_path):
    """Two conversations, a text, and two texts in records."""
    write_lines(tmp_path / "chat.jsonl", GOOD, {"conversations": []}, GOOD)
    (tmp_path / "a.txt").write_text("Some words of plain text.")
    (tmp_path / "b.json").write_text(json.dumps([{"text": "First text."}, {"text": "Second."}]))
    return [tmp_path / "a.txt", tmp_path / "chat.jsonl", tmp_path / "b.json"]


def test_files_of_all_kinds_are_laid_end_to_end_in_their_order(mixed, tokenizer):
    data, report = load_data(mixed, tokenizer, max_length=100, block_size=6, weights=[0.5, 2, 1])
    parts = [load_data([file], tokenizer, max_length=100, block_size=6) for file in mixed]
    assert data.token_ids.tolist() == laid(part.token_ids for part, _ in parts)
    assert data.mask.tolist() == laid(part.mask for part, _ in parts)
    assert data.lengths.tolist() == laid(part.lengths for part, _ in parts)
    assert data.weights.tolist() == [0.5] * len(parts[0][0]) + [2.0] * 2 + [1.0] * len(parts[2][0])
    assert (data.offsets.dtype, data.offsets[0], data.offsets[-1]) == (np.int64, 0, len(data.token_ids))
    assert parts[1][0].weights.tolist() == [1.0, 1.0]

    assert parts[1][1].parts == report.parts[1:2]
    blocks = len(parts[0][0]) + len(parts[2][0])
    assert (report.read, report.texts, report.kept, report.blank, report.blocks) == (6, 3, 2, 1, blocks)
    assert (report.tokens, report.loss_tokens) == (len(data.token_ids), data.mask.sum())
    assert report.summary().startswith(
        f"2 of 3 conversations and {blocks} blocks of 3 texts from a.txt, chat.jsonl, b.json; dropped 1 blank; "
    )
    found = json.loads(json.dumps(report.as_dict()))
    assert found["files"] == ["a.txt", "chat.jsonl", "b.json"] and found["blank"] == 1
    assert [part["files"] for part in found["parts"]] == [["a.txt"], ["chat.jsonl"], ["b.json"]]
    assert "parts" not in found["parts"][0] and "parts" not in parts[0][1].as_dict()


def test_loss_on_all_leaves_out_only_the_beginning_token(mixed, tokenizer, monkeypatch):
    replies, _ = load_data(mixed[1:2], tokenizer, max_length=100, block_size=6)
    everything, report = load_data(mixed[1:2], tokenizer, max_length=100, block_size=6, loss_on="all")
    assert everything.token_ids.tolist() == replies.token_ids.tolist()
    assert np.flatnonzero(~everything.mask).tolist() == everything.offsets[:-1].tolist()
    assert report.loss_tokens == everything.mask.sum() > replies.mask.sum()
    # A cut before the first reply leaves tokens with loss; only the beginning token would leave none.
    cut, report = load_data(mixed[1:2], tokenizer, max_length=3, block_size=6, loss_on="all")
    assert cut.mask.tolist() == [False, True, True] * 2 and (report.too_long, report.truncated) == (0, 2)
    with pytest.raises(ValueError, match=r"none of 2 conversations from .*chat\.jsonl has a token in the loss"):
        load_data(mixed[1:2], tokenizer, max_length=3, block_size=6)
    with monkeypatch.context() as patch:
        patch.delitem(tokenizer._special, "bos_token")  # the template then begins with the system sentence
        without, _ = load_data(mixed[1:2], tokenizer, max_length=100, block_size=6, loss_on="all")
    assert without.mask.all() and len(without.mask) == len(everything.mask) - 2
    text, all_of_it = (
        load_data(mixed[:1], tokenizer, max_length=100, block_size=6, loss_on=loss_on)[0]
        for loss_on in ("assistant", "all")
    )
    assert text.mask.tolist() == all_of_it.mask.tolist()


@pytest.mark.parametrize("empty", [{"text": None}, {"text": ""}, {"text": " ", "conversations": []}, {"text": 3}])
def test_an_empty_field_of_the_first_record_does_not_decide_what_a_file_holds(tmp_path, empty):
    talk, text = {**GOOD, "text": None}, {"text": "some text", "conversations": None}
    for lines, found in (([empty, talk, text], False), ([empty, text, talk], True), ([empty], True), ([{}], False)):
        write_lines(tmp_path / "f.jsonl", *lines)
        assert is_text_file(tmp_path / "f.jsonl") == found


def test_a_text_is_read_on_demand(tmp_path, monkeypatch):
    """Texts larger than memory: the end of the file is not read before the first windows are taken."""
    monkeypatch.setattr(records, "CHUNK_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"some words and\n" * 9 + b"\xff")
    found = windows(next(iter(read_texts(tmp_path / "a.txt", DataReport()))), size=30, context=10)
    assert next(found).text == "some words and\n" * 2 + "some words"
    with pytest.raises(ValueError, match="not UTF-8"):
        list(found)


def test_tokens_outside_the_vocabulary_are_named():
    ids = np.split(np.arange(12), [3, 7])
    data = TokenizedData.of((part, np.ones(len(part), bool)) for part in ids)
    check_vocabulary(data, 12)
    check_vocabulary(data.select([]), 1)
    with pytest.raises(
        ValueError, match=r"^label 7 at token 0 of conversation 2 \(and 4 more\) is outside the backbone's "
    ):
        check_vocabulary(data, 7)
    with pytest.raises(
        ValueError, match=r"^label 11 at token 4 of conversation 2 is .* vocabulary of 11; the tokenizer"
    ):
        check_vocabulary(data, 11)
    negative = TokenizedData.of([([1, 2], [True, True]), ([3, -1], [True, False])])
    with pytest.raises(ValueError, match=r"^token id -1 at token 1 of conversation 1 is outside"):
        check_vocabulary(negative, 11)
