"""The embedded tokenizer as other programs load it."""

import json

from backbone.tokenizer import EMBEDDED, load_tokenizer


def test_older_transformers_know_the_class_of_the_embedded_tokenizer():
    settings = json.loads((EMBEDDED / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 has no TokenizersBackend
    # Checkpoints and results name it by this.
    assert load_tokenizer().fingerprint == "c66fbcf1ddeb4cc1"
