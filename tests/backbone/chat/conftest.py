"""What the tests of templates and of masks share."""

import datetime

import pytest

from backbone.templates import TODAY
from tests.backbone.chat.families import SPECIAL
from tests.backbone.chat.made import embedded_with


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded tokenizer with the tokens that the families write."""
    return embedded_with(tmp_path_factory.mktemp("families") / "t", **{text: text for text in SPECIAL})


@pytest.fixture
def today(monkeypatch):
    """Makes transformers write the date that templates see here."""
    from transformers.utils import chat_template_utils

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(TODAY.year, TODAY.month, TODAY.day)

    monkeypatch.setattr(chat_template_utils, "datetime", Frozen)
