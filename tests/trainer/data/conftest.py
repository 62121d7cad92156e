"""The embedded tokenizer, read once."""

import pytest

from backbone.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()
