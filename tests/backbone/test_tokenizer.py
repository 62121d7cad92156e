"""Chats render as published, the mask marks what the assistant says and nothing else, and streams lose nothing."""

import dataclasses
import gzip
import json
import random
import shutil
import socket
from itertools import compress
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from backbone.config import read_config
from backbone.templates import TEMPLATES
from backbone.tokenizer import EMBEDDED, StreamDecoder, _mask_of_spans, load_tokenizer

DEV = Path(__file__).resolve().parents[3] / "shared" / "data" / "chat" / "dev.jsonl.gz"

CHAT = [
    {"role": "user", "content": "Hi there. How are 2 of you?"},
    {"role": "assistant", "content": "Fine: 42 times! \N{GRINNING FACE} 你好\n\nAnd you?"},
    {"role": "user", "content": "ASSISTANT: me too"},
    {"role": "assistant", "content": "me too"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
# What each template puts before and after a reply.
FRAME = {
    "vicuna": (" ", "</s>"),
    "llama-2": (" ", " </s>"),
    "llama-3": ("", "<|eot_id|>"),
    "chatml": ("", "<|im_end|>"),
}
OWN = "own"


def replies(messages, name):
    before, after = FRAME["vicuna" if name == OWN else name]
    return "".join(before + turn["content"] + after for turn in messages if turn["role"] == "assistant")


def masked_text(tokenizer, ids, mask):
    return tokenizer.decode(list(compress(ids, mask)), skip_special_tokens=False)


def embedded_with(directory, **added):
    """The embedded tokenizer with further special tokens."""
    shutil.copytree(EMBEDDED, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    backend = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, special=True) for text in added.values()])
    backend.save(str(directory / "tokenizer.json"))
    return directory


# Templates


def test_named_templates_render_as_published():
    a, b, c = "a", "b", "c"
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": a},
        {"role": "assistant", "content": b},
        {"role": "user", "content": c},
    ]
    expected = {
        "vicuna": "<s>S USER: a ASSISTANT: b</s>USER: c ASSISTANT:",
        "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]",
        "llama-3": (
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        "chatml": (
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        ),
    }
    assert expected.keys() == TEMPLATES.keys()
    for name, text in expected.items():
        assert load_tokenizer(template=name).render(chat) == text
    assert load_tokenizer(template="llama-2").render(chat[1:2]) == "<s>[INST] a [/INST]"


def test_rendering_equals_transformers_apply_chat_template():
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(EMBEDDED, local_files_only=True)
    for template in (None, *TEMPLATES):
        ours = load_tokenizer(template=template)
        for messages in (CHAT, SYSTEM + CHAT[:3]):
            ids = theirs.apply_chat_template(
                messages, chat_template=ours.template, add_generation_prompt=True, return_dict=False
            )
            assert ours.encode_chat(messages) == ids


def test_unknown_and_missing_templates_are_explained(tmp_path):
    with pytest.raises(
        ValueError, match=r"Unknown chat template 'vicunna'\. Did you mean 'vicuna'\? Available: vicuna,"
    ):
        load_tokenizer(template="vicunna")
    bare = embedded_with(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"bare has no chat template; choose one by name: vicuna, llama-2"):
        load_tokenizer(bare)
    assert load_tokenizer(bare, "vicuna").render(CHAT) == load_tokenizer().render(CHAT)


def test_templates_of_older_directories_are_found(tmp_path):
    older = embedded_with(tmp_path / "older")
    text = (older / "chat_template.jinja").read_text()
    (older / "chat_template.jinja").unlink()
    settings = json.loads((older / "tokenizer_config.json").read_text())
    for own in (text, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]):
        (older / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": own}))
        assert load_tokenizer(older).render(CHAT) == load_tokenizer().render(CHAT)


def test_templates_run_in_a_sandbox_and_their_mistakes_are_errors(tmp_path):
    folder = embedded_with(tmp_path / "t")
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}A"
        "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert load_tokenizer(folder).render(CHAT[2:], False) == "26 Jul 2024UASSISTANT: me tooAme too</s>"
    for text, complaint in [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for %}", "does not parse, line 1"),
        ("{{ raise_exception('no such role') }}", "no such role"),
    ]:
        (folder / "chat_template.jinja").write_text(text)
        with pytest.raises(ValueError, match=complaint):
            load_tokenizer(folder)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "does not open with a user message"),
        (CHAT[1:], "does not open with a user message"),
        (CHAT + SYSTEM, "message 4 is a system message"),
        ([{"role": "human", "content": "hi"}], "role 'human', expected one of system, user, assistant"),
        ([{"role": "user", "content": None}], "message 0"),
        (["hi"], "message 0 is 'hi'"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(messages, complaint):
    tokenizer = load_tokenizer()
    for use in (tokenizer.render, tokenizer.encode_chat, tokenizer.encode_with_mask):
        with pytest.raises(ValueError, match=complaint):
            use(messages)


# The mask


@pytest.mark.parametrize("name", [OWN, *TEMPLATES])
def test_masked_tokens_spell_the_replies_and_their_ends(name):
    tokenizer = load_tokenizer(template=None if name == OWN else name)
    for messages in (CHAT, SYSTEM + CHAT, CHAT[:3], CHAT[:2]):
        ids, mask = tokenizer.encode_with_mask(messages)
        assert ids == tokenizer.encode_chat(messages, add_generation_prompt=False)
        assert masked_text(tokenizer, ids, mask) == replies(messages, name)
        # The control: a mask that is off by one token, either way, is caught by the same comparison.
        for shifted in ([*mask[1:], False], [False, *mask[:-1]]):
            assert masked_text(tokenizer, ids, shifted) != replies(messages, name)


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_hold_on_a_sentencepiece_vocabulary(sentencepiece_directory, name):
    tokenizer = load_tokenizer(sentencepiece_directory, name)
    ids, mask = tokenizer.encode_with_mask(CHAT)
    # This decoder drops one space at the start of a text, and U+2581 opens the text after a special token.
    found = masked_text(tokenizer, ids, mask).replace(" ", "")
    assert found == replies(CHAT, name).replace(" ", "")


def test_special_end_tokens_are_masked_and_end_a_reply(tmp_path):
    folder = embedded_with(tmp_path / "chatml", start="<|im_start|>", end="<|im_end|>")
    tokenizer = load_tokenizer(folder, "chatml")
    assert tokenizer.end_of_turn == "<|im_end|>" and tokenizer.eos_ids == (2, 4097)
    ids, mask = tokenizer.encode_with_mask(CHAT)
    assert masked_text(tokenizer, ids, mask) == replies(CHAT, "chatml")
    assert [masked for token, masked in zip(ids, mask, strict=True) if token == 4097] == [False, True, False, True]
    assert not mask[-1]  # the line break after the last <|im_end|>
    assert load_tokenizer().end_of_turn == "</s>" and load_tokenizer().eos_ids == (2,)
    llama_3 = load_tokenizer(template="llama-3")  # its end is several tokens of this vocabulary
    assert llama_3.end_of_turn == "<|eot_id|>" and llama_3.eos_ids == (2,)


def test_four_tokens_of_mask_by_hand():
    # "U: a b" in tokens "U:" " a" " b" with the reply "b" from character 4, its space included
    assert _mask_of_spans([(0, 2), (2, 4), (4, 6), (6, 7)], [(4, 6)]) == [False, False, True, False]
    # the same where the tokenizer leaves spaces out of its offsets
    assert _mask_of_spans([(0, 2), (3, 4), (5, 6), (6, 7)], [(4, 6)]) == [False, False, True, False]
    # and gives a token that is nothing but the reply's last space the empty range after it
    assert _mask_of_spans([(0, 2), (3, 4), (5, 5), (5, 9)], [(2, 5)]) == [False, True, True, False]
    # two tokens of one character
    assert _mask_of_spans([(0, 1), (1, 2), (1, 2), (2, 3)], [(1, 2)]) == [False, True, True, False]
    assert _mask_of_spans([], []) == []


def test_templates_that_change_their_past_are_refused(tmp_path):
    folder = embedded_with(tmp_path / "t")
    (folder / "chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="renders turn 1 differently"):
        load_tokenizer(folder).encode_with_mask(CHAT)


def test_many_conversations_are_encoded_as_one_by_one():
    tokenizer = load_tokenizer()
    many = [CHAT, SYSTEM + CHAT, CHAT[:2]] * 200
    singles = [tokenizer.encode_with_mask(messages) for messages in many[:3]]
    assert list(tokenizer.encode_many_with_mask(many)) == singles * 200
    assert list(tokenizer.encode_many_with_mask([])) == []


@pytest.mark.skipif(not DEV.exists(), reason="needs the chat data")
@pytest.mark.parametrize("name", [OWN, *TEMPLATES])
def test_masks_spell_the_replies_of_real_conversations(name):
    roles = {"human": "user", "gpt": "assistant"}
    with gzip.open(DEV, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line, _ in zip(file, range(120), strict=False)]
    chats = [[{"role": roles[t["from"]], "content": t["value"].strip()} for t in r["conversations"]] for r in records]
    tokenizer = load_tokenizer(template=None if name == OWN else name)
    for messages, (ids, mask) in zip(chats, tokenizer.encode_many_with_mask(chats), strict=True):
        assert masked_text(tokenizer, ids, mask) == replies(messages, name)


# Vocabularies


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
