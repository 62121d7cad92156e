"""Which conversations go into a corpus, and how the others are counted."""

import numpy as np

from corpus.dialogue import Dialogue
from corpus.options import Options
from corpus.selection import Selection
from trainer.data.prompts import Prompt


def dialogue(question="a", index=0, **more):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
    return Dialogue(index, "", True, np.zeros(1), messages=messages, **more)


def test_loops_and_repeated_openings_are_limited():
    selection = Selection(Options(max_loops=0.5))
    given = [dialogue("a"), dialogue("A"), dialogue("b", loops=True), dialogue("c", loops=True), dialogue("d")]
    assert [selection.accept(each) for each in given] == [True, False, True, False, True]
    assert selection.dropped == {"same opening as an earlier one": 1, "reply in a loop": 1}


def test_conversations_that_end_before_their_last_prompt_are_counted():
    selection = Selection(Options())
    for questions, cut in ((("a",), ""), (("a", "b"), "reply cut"), (("a", "b", "c"), "")):
        assert selection.accept(dialogue(prompt=Prompt("1", "chat", questions), num_tokens=9, cut=cut))
    expected = "\n2 end before the last turn of their prompt: 1 reply cut, 1 as --max-turns says;"
    assert expected in selection.summary()


def test_repeated_prompts_and_their_loops_are_accepted_without_a_limit():
    def accepted(**changes):
        selection = Selection(Options(**changes))
        return [selection.accept(dialogue(index=i, prompt=Prompt("1", "chat", ("a",)), loops=i > 0)) for i in range(4)]

    assert accepted() == [True, True, True, True]
    assert accepted(max_loops=0.5) == [True, True, False, False]
