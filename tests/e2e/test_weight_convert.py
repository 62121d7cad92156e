"""weight_convert.py as a user types it: formats recognized, notes, exit statuses, and mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backbone.config import read_config
from backbone.formats import FORMATS, recognize
from backbone.tokenizer import EMBEDDED, load_tokenizer
from backbone.weights import fingerprint, read_backbone
from runtime.atomic import HOST
from tests.backbone.models import raw_config, write_model
from weight_convert import main

ROOT = Path(__file__).resolve().parents[2]


def run(*words, status=0):
    done = subprocess.run(
        [sys.executable, "weight_convert.py", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == status, (words, done.returncode, done.stderr[-3000:])
    return done


def test_the_embedded_backbone_goes_round_through_every_format(tmp_path):
    chain = [EMBEDDED]
    for to in ("hf-bin", "meta", "jittor-pkl", "safetensors"):
        out = tmp_path / ("one.pkl" if to == "jittor-pkl" else to)
        done = run(chain[-1], "--to", to, "--out", out, "--shard-size", "5MB")
        record = json.loads(done.stdout.splitlines()[-1])
        assert record["out_format"] == to == recognize(out) and record["source_format"] == recognize(chain[-1])
        assert record["tensors"] == 57 and record["rounding"] == 0 and record["verified"] is None
        assert "writing" in done.stderr
        chain.append(out)
    assert (tmp_path / "safetensors" / "model-00003-of-00003.safetensors").is_file()
    config = read_config(EMBEDDED)
    marks = {fingerprint(read_config(path), read_backbone(path, config)) for path in chain}
    assert len(marks) == 1
    assert load_tokenizer(tmp_path / "safetensors").fingerprint == load_tokenizer(EMBEDDED).fingerprint


def test_verify_shows_every_tensor_and_the_logits_and_its_status_says_whether_all_is_well(tmp_path):
    done = run(EMBEDDED, "--to", "meta", "--out", tmp_path / "meta", "--verify")
    *table, verdict, record = done.stdout.splitlines()
    assert len(table) == 1 + 57 + 1 and table[-1].split()[0] == "logits" and table[-1].split()[-1] == "0"
    assert verdict == "all 58 within the tolerance" and json.loads(record)["verified"] is True
    words = (tmp_path / "meta", "--to", "safetensors", "--dtype", "bfloat16", "--verify", "--out")
    done = run(*words, tmp_path / "rounded")
    assert "float16 -> bfloat16" in done.stdout and "rounding: at most 0.0" in done.stderr
    done = run(*words, tmp_path / "strict", "--tolerance", 0, status=1)
    assert "above the allowed 0" in done.stdout and json.loads(done.stdout.splitlines()[-1])["verified"] is False


def test_all_formats_of_both_kinds_are_listed():
    lines = run("--list").stdout.splitlines()
    backbones = {line.split()[1] for line in lines if line.startswith("backbone ")}
    assert backbones == set(FORMATS)
    assert {"medusa", "eagle"} <= {line.split()[1] for line in lines if line.startswith("head ")}


MISTAKES = [
    ((), "SOURCE, --to, --out missing"),
    (("nowhere", "--to", "meta", "--out", "{tmp}/x"), "nowhere does not exist"),
    (("{hf}", "--to", "hf-bim", "--out", "{tmp}/x"), "Unknown format 'hf-bim'. Did you mean 'hf-bin'?"),
    (("{hf}", "--to", "medusa", "--out", "{tmp}/x"), "is a backbone and medusa a format of heads"),
    (("{hf}", "--to", "meta", "--out", "{tmp}/x", "--from", "meta"), "params.json does not exist"),
    (("{hf}", "--to", "meta", "--out", "{tmp}/x", "--shard-size", "2 elephants"), "'2 elephants' is not a size"),
    (("{hf}", "--to", "meta", "--out", "{tmp}/x", "--tolerance", "1"), "--tolerance belongs to --verify"),
    (
        ("{hf}", "--to", "meta", "--out", "{tmp}/x", "--verify", "--tolerance", "nan"),
        "--tolerance must be a number, got nan",
    ),
    (("{hf}", "--to", "meta", "--out", "{tmp}/x", "--merge"), "--backbone and --merge are for heads"),
    (("{hf}", "--to", "meta", "--out", "{tmp}/x", "--overwite"), "Did you mean '--overwrite'?"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_answered_before_anything_is_written(tmp_path, words, message):
    hf = write_model(tmp_path / "hf", raw_config())
    words = [word.format(hf=hf, tmp=tmp_path) for word in words]
    with pytest.raises(ValueError) as caught:
        main(words)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    done = run(tmp_path / "nowhere", "--to", "meta", "--out", tmp_path / "x", status=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


def test_a_damaged_source_is_refused_by_name(tmp_path):
    hf = write_model(tmp_path / "hf", raw_config())
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        main([str(hf), "--to", "hf-bin", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_what_is_no_backbone_goes_to_the_heads_with_all_its_options(tmp_path, monkeypatch):
    calls = []

    class Heads:
        FORMATS = {"medusa": "a head", "jittor-pkl": "a head"}  # noqa: RUF012

        @staticmethod
        def convert(source, to, out, options):
            calls.append((source, to, out, options))
            return 7

    monkeypatch.setitem(sys.modules, "heads.formats", Heads)
    head = tmp_path / "medusa_lm_head.pt"
    torch.save({"0.0.linear.weight": torch.ones(2, 2)}, head)
    words = [str(head), "--to", "gorgon", "--out", str(tmp_path / "x")]
    words += ["--backbone", "b", "--merge", "--dtype", "float16"]
    assert main(words) == 7
    assert main([*words, "--from", "medusa", "--overwrite"]) == 7
    assert main([*words, "--from", "jittor-pkl"]) == 7  # a name of both kinds: the files say which
    (source, to, out, options), (_, _, _, second), (_, _, _, third) = calls
    assert (source, to, out) == (head, "gorgon", tmp_path / "x")
    assert (options.backbone, options.merge, options.dtype, options.source_format) == ("b", True, "float16", None)
    assert (second.source_format, second.overwrite, options.overwrite) == ("medusa", True, False)
    assert third.source_format == "jittor-pkl"


def test_a_conversion_takes_less_memory_than_the_model_in_every_step(tmp_path):
    done = subprocess.run(
        [sys.executable, "bench/conversion.py", "--scratch", tmp_path, "--size", "160MB", "--shard-size", "40MB"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["identical"] is True and 150e6 < record["model_bytes"] < 170e6
    assert [(step["from"], step["to"]) for step in record["steps"]] == [
        ("hf-bin", "safetensors"), ("safetensors", "meta"), ("meta", "jittor-pkl"),
    ]  # fmt: skip
    # The interpreter with its libraries is about 50 MB of it.
    assert all(0 < step["peak_bytes"] < 130e6 for step in record["steps"]), record["steps"]
    assert not list(tmp_path.iterdir())


def test_what_a_killed_conversion_left_behind_is_removed_by_the_next(tmp_path):
    hf = write_model(tmp_path / "hf", raw_config())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".out.pkl.{HOST}.{gone.pid}.partial").write_bytes(b"half")
    (tmp_path / f".out.{HOST}.{gone.pid}.partial").mkdir()
    for out in ("out.pkl", "out"):
        assert main([str(hf), "--to", "jittor-pkl", "--out", str(tmp_path / out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out", "out.pkl"]
