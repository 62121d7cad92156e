"""Conversations, and the embedded tokenizer with further special tokens and another template."""

import shutil
from itertools import compress

from tokenizers import AddedToken, Tokenizer

from backbone.tokenizer import EMBEDDED, load_tokenizer

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


def talk(*turns):
    """Messages of the user and the assistant in turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def embedded_with(directory, **added):
    """The embedded tokenizer with further special tokens."""
    shutil.copytree(EMBEDDED, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    backend = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, special=True) for text in added.values()])
    backend.save(str(directory / "tokenizer.json"))
    return directory


def load_with(folder, template):
    """The tokenizer of a folder with this template as its own."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    return load_tokenizer(folder)
