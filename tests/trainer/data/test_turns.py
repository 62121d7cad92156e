"""One reader of turns: what is null or empty decides nothing, what cannot be used is left out with its reason."""

import pytest

from trainer.data.turns import MOST_REASONS, LeftOut, Unusable, read_messages

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
BRIEF = {"role": "system", "content": "Be brief."}
NULLS = [{"from": None, "value": None, **turn} for turn in HI]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"conversations": None, "messages": HI}, HI),
        ({"conversations": [], "messages": HI}, HI),
        ({"conversations": SHARE, "messages": None}, HI),
        ({"conversations": NULLS}, HI),
        ({"conversations": [{**turn, "role": "", "content": ""} for turn in SHARE]}, HI),
        ({"messages": [{**turn, "tool_calls": None, "weight": None} for turn in HI], "tools": []}, HI),
        ({"conversations": SHARE, "system": "Be brief."}, [BRIEF, *HI]),
        ({"conversations": SHARE, "system": None, "system_prompt": "Be brief."}, [BRIEF, *HI]),
        ({"messages": [BRIEF, *HI], "system": "Be brief."}, [BRIEF, *HI]),
        ({"conversations": SHARE, "system": " ", "tools": "[]"}, HI),
        ({"messages": [{"role": "system", "content": " "}, *HI], "system": "Be brief."}, [BRIEF, *HI]),
    ],
)
def test_the_filled_field_counts(record, messages):
    assert read_messages(record) == messages


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "null instead of an object"),
        ("hi", "a string instead of an object"),
        ([*SHARE], "a list instead of an object"),
        ({}, "an empty object"),
        ({"conversation": SHARE}, "neither conversations nor messages among the keys conversation"),
        ({"conversations": "[]"}, "a string instead of a list of turns"),
        ({"conversations": [SHARE]}, "a list instead of a turn"),
        ({"messages": [{"role": "tool", "content": "42"}]}, "a turn from 'tool'"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, "a turn from 'bing'"),
        ({"conversations": [{"from": "x" * 99, "value": "a"}]}, "a turn from 'xxxxxxxxxxxxxxxxxxxxxxxxxx..."),
        ({"conversations": [{"value": "a"}]}, "a turn without a role"),
        ({"conversations": [{"from": "human", "role": "assistant", "value": "a"}]}, "from and role differ"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "a turn without text"),
        ({"conversations": [{"from": "gpt", "value": 42}]}, "a number instead of a turn's text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a list instead of a turn's text"),
        ({"messages": [{**HI[1], "tool_calls": [{"id": 1}]}]}, "a turn that calls a tool"),
        ({"messages": [HI[0], {**HI[1], "weight": 0}]}, "a reply of weight 0"),
        ({"messages": HI, "tools": [{"name": "f"}]}, "tools, which are not supported"),
        ({"messages": [BRIEF, *HI], "system": "Be kind."}, "a system turn beside another system text"),
        ({"messages": HI, "system": {}, "system_prompt": ["a"]}, "a list instead of a system text"),
    ],
)
def test_what_cannot_be_used_is_said(record, reason):
    with pytest.raises(Unusable) as caught:
        read_messages(record)
    assert str(caught.value) == reason


def test_reasons_are_counted_with_their_first_place_and_bounded():
    left = LeftOut()
    for number in range(3 * MOST_REASONS):
        left.count(f"reason {number % (2 * MOST_REASONS)}", f"/some where/a b.json item {number}")
    assert left.reasons.total() == 3 * MOST_REASONS and len(left.reasons) == MOST_REASONS + 1
    assert left.as_dict()["left_out"]["reason 3"] == {"records": 2, "first": "a b.json item 3"}
    assert left.describe(1).endswith("other reasons (40)") or "other reasons" in left.describe(1)


def test_fields_that_are_not_read_are_counted():
    left = LeftOut()
    turns = [{**turn, "name": "x", "markdown": ""} for turn in HI]
    left.ignore({"messages": turns, "id": 1, "source": "web", "lang": None}, {"messages", "id"})
    left.ignore({"conversations": SHARE, "messages": HI[:1]}, {"messages", "conversations"})
    assert left.as_dict() == {"unread_fields": {"source": 1, ".name": 1, "messages": 1}}
