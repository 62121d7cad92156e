"""The embedded backbone and its tokenizer, loaded once."""

import pytest

from backbone.model import load_backbone
from backbone.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def backbone():
    return load_backbone()


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()
