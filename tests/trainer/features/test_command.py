"""``python -m trainer.features``: the cache of all heads, written and verified."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from backbone.model import load_backbone
from runtime.entry import run_entry
from tests.trainer.data.made import write_talks
from trainer.config import TrainConfig
from trainer.data.splits import load_splits
from trainer.features import command
from trainer.features.cache import OnlineFeatures, array_names, cache_key, open_cache
from trainer.features.command import layers_of, main


@pytest.fixture
def corpus(tmp_path):
    return write_talks(tmp_path / "talks.jsonl", 20)


def test_the_command_writes_the_layers_of_all_heads_and_verifies_them(corpus, tmp_path, capfd):
    options = ["--data", str(corpus), "--cache-dir", str(tmp_path / "cache"), "--held-out", "2"]
    backbone, splits = load_backbone(), load_splits(TrainConfig(data=[str(corpus)], held_out=2))
    tokenizer = splits.tokenizer
    layers = layers_of(None, backbone)
    assert layers and set(layers_of(["gated_rnn"], backbone)) <= set(layers)

    assert run_entry(main, [*options, "--verify"]) == 2
    assert "other shards are missing, the 0 others are intact" in capfd.readouterr().err
    assert not (tmp_path / "cache").exists()

    assert run_entry(main, options) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report["status"] == "written" and report["arrays"] == array_names(layers)
    parts = {"training": splits.training, "held out": splits.held_out}
    assert [(part["part"], Path(part["path"])) for part in report["parts"]] == [
        (name, tmp_path / "cache" / cache_key(backbone, tokenizer.fingerprint, part)) for name, part in parts.items()
    ]
    online = OnlineFeatures(backbone, parts["held out"], layers)([1])
    announced = []
    cached = open_cache(
        backbone, tokenizer.fingerprint, parts["held out"], layers, tmp_path / "cache", lambda *a: announced.append(a)
    )([1])
    assert announced == []
    np.testing.assert_array_equal(cached.hidden.numpy(), online.hidden.numpy().astype(np.float16).astype(np.float32))

    assert run_entry(main, [*options, "--verify"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["status"] == "verified"
    os.truncate(Path(report["parts"][1]["path"]) / "hidden-00000.f16", 1000)
    assert run_entry(main, [*options, "--verify"]) == 2
    assert "hidden-00000.f16 is damaged" in capfd.readouterr().err


def test_the_layers_are_those_of_every_head_that_can_be_built_and_is_trained(monkeypatch, capfd):
    def build(name, options, backbone):
        if name == "broken":
            raise ValueError("needs six layers")
        return SimpleNamespace(layers={"one": (5, 2), "other": (2, 3), "untrained": (9,)}[name])

    monkeypatch.setattr(command, "available", lambda: ["broken", "one", "other", "untrained"])
    monkeypatch.setattr(command, "head_class", lambda name: SimpleNamespace(trained=name != "untrained"))
    monkeypatch.setattr(command, "build", build)
    assert layers_of(None, None) == (2, 3, 5)
    assert "skipped broken: needs six layers" in capfd.readouterr().err
    assert layers_of(["other"], None) == (2, 3) and layers_of(["untrained"], None) == ()
    with pytest.raises(ValueError, match="needs six layers"):
        layers_of(["one", "broken"], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "gated"], "Unknown head 'gated'. Did you mean 'gated_rnn'?"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--held-ot", "3"], "Unknown option '--held-ot'. Did you mean '--held-out'?"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(options, message, corpus, tmp_path, capfd):
    assert run_entry(main, ["--data", str(corpus), "--cache-dir", str(tmp_path / "cache"), *options]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "cache").exists()
