"""Prompt lookup: what followed the same few tokens earlier in the text."""

from heads.prompt_lookup.head import PromptLookupHead

HEAD = PromptLookupHead
