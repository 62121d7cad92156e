"""The mask marks what the assistant says and nothing else, as transformers does with replies marked by hand."""

import gzip
import json
from itertools import compress
from pathlib import Path

import pytest

from backbone.replies import Span, mask_of_spans
from backbone.templates import TEMPLATES, ConversationError
from backbone.tokenizer import load_tokenizer
from tests.backbone.chat.families import FAMILIES, untagged
from tests.backbone.chat.made import CHAT, OWN, SYSTEM, embedded_with, load_with, masked_text, replies, talk

DEV = Path(__file__).resolve().parents[4] / "shared" / "data" / "chat" / "dev.jsonl.gz"

# No reply ends in a character of several tokens: of that, transformers masks the first.
TALKS = {
    "one turn": talk("Hi", "Hello there."),
    "turns": CHAT,
    "a system text": SYSTEM + CHAT,
    "the user last": CHAT[:3],
    "white space": talk(" a ", " padded\n", "b\n", "\n lead"),
    "nothing said": talk("a", "", "b", "c"),
    "twice the same": talk("same", "same", "same", "same"),
    "tokens in the text": talk(
        "a </s> b", "use </s> and <|im_end|> ok", "c", "d ASSISTANT: USER: e\n\n### Response:\nf"
    ),
    "marks in the text": talk("\ue000", "x\ue001y", "z\ue001", "\ue001!"),
    "one thought": talk("a", "<think>\nhm\n</think>\n\nyes"),
    "thoughts": talk("a", "<think>\nhm\n</think>\n\nyes", "b", "<think>\nho\n</think>\n\nno"),
}
REFUSED = {("r1", "one thought"), ("r1", "thoughts"), ("qwen-3", "thoughts")}  # thoughts are left out
SYSTEM_REFUSED = {"gemma", "mistral, strict"}


@pytest.fixture(scope="module")
def theirs(folder):
    """theirs(template, messages): token ids and mask by transformers, or None where the template refuses them."""
    import jinja2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(template, messages):
        try:
            found = tokenizer.apply_chat_template(
                messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
            )
        except jinja2.TemplateError:
            return None
        return found["input_ids"], [bool(masked) for masked in found["assistant_masks"]]

    return encode


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_those_of_transformers_with_the_replies_marked_by_hand(folder, theirs, today, name):
    tagged = FAMILIES[name][0]
    for template, inferred in ((untagged(tagged), True), (tagged, False)):
        ours = load_with(folder, template)
        for kind, messages in TALKS.items():
            expected = theirs(tagged, messages)
            if expected is None or (inferred and (name, kind) in REFUSED):
                assert (name in SYSTEM_REFUSED) == (expected is None), kind
                with pytest.raises(ConversationError, match=r"refuses|leaves out or changes"):
                    ours.encode_with_mask(messages)
                continue
            ids, mask = ours.encode_with_mask(messages)
            assert ids == expected[0], kind
            assert list(compress(ids, mask)) == list(compress(ids, expected[1])) and mask == expected[1], kind
            # The control: a mask with a token less is not theirs.
            if any(mask):
                assert [*mask[: mask.index(True)], False, *mask[mask.index(True) + 1 :]] != expected[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_ends_a_turn_ends_decoding(folder, today, name):
    template, end = FAMILIES[name]
    for text in (template, untagged(template)):
        tokenizer = load_with(folder, text)
        assert tokenizer.end_of_turn == end
        token = tokenizer.encode(end)
        assert len(token) != 1 or token[0] in tokenizer.eos_ids


def test_a_reply_that_the_template_changes_is_refused_and_the_next_conversation_is_not(folder):
    tokenizer = load_with(folder, untagged(FAMILIES["r1"][0]))
    plain, thought, reasons = TALKS["turns"], TALKS["thoughts"], []
    found = list(tokenizer.encode_many_with_mask([plain, thought, plain, []], lambda *reason: reasons.append(reason)))
    assert found == [tokenizer.encode_with_mask(plain)] * 2
    assert [index for index, _ in reasons] == [1, 3]
    assert "leaves out or changes a part of the reply in message 1" in str(reasons[0][1])
    assert "does not open with a user message" in str(reasons[1][1])
    with pytest.raises(ConversationError, match="message 1"):
        list(tokenizer.encode_many_with_mask([plain, thought]))
    for template in (  # replies in another order, twice, shortened, or not at all
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content[:4] }}{% endfor %}",
        "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}",
        "{% for m in messages %}{{ m.content | lower }}{% endfor %}",
    ):
        with pytest.raises(ConversationError, match="leaves out or changes a part"):
            load_with(folder, template).encode_with_mask(CHAT)


def test_a_text_around_the_replies_may_change_in_a_longer_conversation(folder, theirs):
    template = (
        "{{ messages | length }}{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    )
    template += "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    for messages in (CHAT, SYSTEM + CHAT):
        assert load_with(folder, untagged(template)).encode_with_mask(messages) == theirs(template, messages)


def test_replies_marked_in_a_macro_or_a_block_are_found(folder, theirs):
    marked = "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    plain = "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content }}{% else %}X{% endif %}{% endfor %}"
    expected = theirs(plain.replace("X", "A: " + marked), CHAT)
    macro = "{% macro say(m) %}A: " + marked + "{% endmacro %}" + plain.replace("X", "{{ say(m) }}")
    block = plain.replace("X", "{% set said %}A: " + marked + "{% endset %}{{ said }}")
    for template in (macro, block):
        assert load_with(folder, template).encode_with_mask(CHAT) == expected
        assert theirs(template, CHAT) != expected  # transformers takes the place in the macro for that in the text
    used = plain.replace("X", "{% set said %}" + marked + "{% endset %}{{ said | length }}")
    with pytest.raises(ConversationError, match="uses the text of a reply"):
        load_with(folder, used).encode_with_mask(CHAT)


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
    assert mask_of_spans([(0, 2), (2, 4), (4, 6), (6, 7)], [Span(4, 5, 6)]) == [False, False, True, False]
    # the same where the space is the prompt's, or the tokenizer leaves spaces out of its offsets
    assert mask_of_spans([(0, 2), (2, 4), (4, 6), (6, 7)], [Span(5, 5, 6)]) == [False, False, True, False]
    assert mask_of_spans([(0, 2), (3, 4), (5, 6), (6, 7)], [Span(4, 5, 6)]) == [False, False, True, False]
    # and gives a token that is nothing but the reply's last space the empty range after it
    assert mask_of_spans([(0, 2), (3, 4), (5, 5), (5, 9)], [Span(2, 3, 5)]) == [False, True, True, False]
    # two tokens of one character
    assert mask_of_spans([(0, 1), (1, 2), (1, 2), (2, 3)], [Span(1, 1, 2)]) == [False, True, True, False]
    # white space that the head's token takes in is no reason to mask the head
    assert mask_of_spans([(0, 4), (4, 6), (6, 7)], [Span(3, 4, 7)]) == [False, True, True]
    assert mask_of_spans([], []) == []


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
