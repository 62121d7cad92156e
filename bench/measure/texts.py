"""The backbone's own greedy texts, and the ranks a head gives their tokens: what a calibration is computed from.

By default, the prompts are the users' turns of the conversations that train.py holds out of the embedded corpus: no
head was trained on them, and the prompts of bench/run.py stay unseen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.measure.attempts import ADAPTED, BASELINE, Setup, usable_prompts
from bench.record.prompts import Prompt, PromptSet, spread
from bench.tables.terminal import note
from decoding.acceptance import RankedText
from decoding.generate import generate_autoregressive
from runtime.interrupt import check_interrupt
from trainer.config import EMBEDDED_CORPUS, TrainConfig
from trainer.data.prompts import prompt_of
from trainer.data.splits import held_out_conversations, split_text
from trainer.data.tokens import TokenizedData
from trainer.features.cache import OnlineFeatures
from trainer.scoring import teacher_forced_ranks


@dataclass(frozen=True)
class GreedyText:
    """A reply of the backbone that the head decodes with. after: how it would continue past the end."""

    prompt_id: str
    prompt_ids: list[int]
    token_ids: list[int]
    after: list[int]


def held_out_prompts(tokenizer, max_positions: int, num_prompts: int | None) -> tuple[PromptSet, str]:
    """The users' turns of the held-out conversations of the embedded corpus, and the hash of all its tokens.

    The split is train.py's with its default options: it depends on the tokenizer and on nothing else. The hash is what
    a checkpoint that was trained on this text has for ``data.sha256``.
    """
    config = TrainConfig(data=[str(EMBEDDED_CORPUS)])
    splits = split_text(config, tokenizer, max_positions)
    prompts = [prompt_of(talk) for talk in held_out_conversations(config, splits)]
    if num_prompts is not None:
        prompts = spread(prompts, num_prompts)
    sha256 = hashlib.sha256(EMBEDDED_CORPUS.read_bytes()).hexdigest()
    return PromptSet(tuple(prompts), {}, f"{EMBEDDED_CORPUS} (held out)", sha256), splits.sha256


def decode_texts(setup: Setup, prompts: Sequence[Prompt], on_prompt=lambda: None) -> list[GreedyText]:
    """Decode every turn of every prompt that can be decoded, token by token, with the histories of a measurement.

    A turn whose prompt does not fit into the cache ends its conversation. on_prompt: called after each prompt.
    """
    texts, num_after = [], setup.head.num_depths
    prompts, failures = usable_prompts(setup, prompts)
    for failure in failures:
        note(f"warning: prompt {failure.prompt_id} is left out: {failure.error}")
        on_prompt()
    for prompt in prompts:
        messages = prompt.opening()
        for turn in prompt.turns:
            messages.append({"role": "user", "content": turn})
            prompt_ids = setup.tokenizer.encode_chat(messages)
            if len(prompt_ids) > setup.cache.max_length:
                break
            baseline = setup.decode(prompt_ids, BASELINE)
            own = setup.decode(prompt_ids, ADAPTED) if setup.adapts else baseline
            text, after = [*prompt_ids, *own.token_ids], []
            if len(text) < setup.cache.max_length:
                more = generate_autoregressive(setup.decoder, text, max_new_tokens=num_after, cache=setup.cache)
                after = more.token_ids
            texts.append(GreedyText(prompt.prompt_id, prompt_ids, own.token_ids, after))
            messages.append({"role": "assistant", "content": setup.reply_text(baseline)})
        on_prompt()
        check_interrupt()
    return texts


def distinct(texts: Sequence[GreedyText]) -> list[GreedyText]:
    """Each reply once, the first time it occurs.

    For prompts that the backbone wrote itself: of 738 replies to the held-out ones, 230 repeat another, which a head
    trained on such text knows well. Counted once, they predict the embedded prompts better: for eight heads, the accept
    length with 16 nodes was predicted as 1.07 to 1.11 times the measured one, instead of 1.09 to 1.13.
    """
    found: dict[tuple[int, ...], GreedyText] = {}
    for text in texts:
        found.setdefault(tuple(text.token_ids), text)
    return list(found.values())


def rank_texts(head, backbone, texts: Sequence[GreedyText], on_texts=lambda count: None) -> list[RankedText]:
    """The ranks of each text's tokens, as the head scores them in evaluation mode under the true tokens before them.

    backbone: the original one, whose features ``head.execute`` is given, also by a head that changes it. on_texts:
    called with the number of texts that were added.
    """
    longest, sequences = backbone.config.max_positions, []
    for text in texts:
        ids = np.array([*text.prompt_ids, *text.token_ids, *text.after][:longest], np.int32)
        sequences.append((ids, np.arange(len(ids)) >= len(text.prompt_ids)))
    data = TokenizedData.of(sequences)
    source, found = OnlineFeatures(backbone, data, tuple(head.layers)), {}
    for batch in teacher_forced_ranks(head, data, source):
        start = 0
        for index in batch.indices:
            found[index] = _table(batch.ranks, batch.positions - start, texts[index])
            start += int(data.lengths[index])
        on_texts(len(batch.indices))
        check_interrupt()
    return [found[index] for index in range(len(texts))]


def _table(ranks: np.ndarray, positions: np.ndarray, text: GreedyText) -> RankedText:
    """A text's part of a batch's ranks, (depths, num). positions: (num,), counted from the text's first token;
    those outside its reply are left out. Column i comes from the position before its token i."""
    columns = positions - (len(text.prompt_ids) - 1)
    inside = (columns >= 0) & (columns < len(text.token_ids) - 1)
    table = np.full((len(ranks), len(text.token_ids) - 1), -1, np.int32)
    table[:, columns[inside]] = ranks[:, inside]
    return RankedText(table, len(text.prompt_ids))
