"""Heads are found in the repository and outside it, a broken one is named, and no other file knows a head by name."""

import ast
import os
from pathlib import PurePosixPath

import pytest

import train
from heads.chains import chain_of
from heads.checkpoint import load_head, save_checkpoint
from heads.registry import FOLDER, available, build, chain_writer, folders, head_class, head_folder, summary
from runtime.entry import run_entry
from trainer.config import parse

ROOT = FOLDER.parent
ROOMS = ("backbone", "bench", "decoding", "heads", "ops", "runtime", "trainer")
CODE = '''"""Guesses what the backbone guesses."""

from dataclasses import dataclass

from heads.base import Head, HeadOutput, option


@dataclass
class Config:
    """Options."""

    num_depths: int = option(2, "tokens drafted after the root")


class {name}(Head):
    """All depths alike."""

    Config = Config
    parallel = True
    trained = False

    def execute(self, features, token_ids, positions):
        return HeadOutput([self.lm_logits(self.select(features.hidden, positions))] * self.num_depths)
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """write(name, ...): a head in a folder that GORGON_HEADS names. Names differ between tests: modules stay loaded."""
    root = tmp_path / "mine"
    root.mkdir()
    monkeypatch.setenv("GORGON_HEADS", str(root))

    def write(name, code=None, package=None, root=root):
        folder = root / name
        folder.mkdir(parents=True)
        class_name = "".join(word.title() for word in name.split("_")) + "Head"
        (folder / "head.py").write_text(CODE.replace("{name}", class_name) if code is None else code)
        package = f'"""{name} in a line."""\n\nfrom .head import {class_name} as HEAD\n' if package is None else package
        (folder / "__init__.py").write_text(package)
        return folder

    return write


def test_a_head_outside_the_repository_is_a_head_like_any_other(outside, backbone, tmp_path, capsys):
    folder = outside("far_one")
    (folder / "recipe.yaml").write_text("epochs: 7\n")
    assert "far_one" in available() and available() == sorted(available())
    assert head_folder("far_one") == folder and head_class("far_one").__module__ == "heads.far_one.head"
    assert summary("far_one") == "far_one in a line."
    config = parse(["--head", "far_one", "--head.num_depths", "3"])
    assert (config.epochs, config.head_options) == (7.0, {"num_depths": 3})
    assert run_entry(train.main, ["--list-heads"]) == 0
    assert "far_one          parallel    far_one in a line." in capsys.readouterr().out
    head = build("far_one", {}, backbone)
    config = {"head": "far_one", "head_config": {"num_depths": 2}, "backbone": {"fingerprint": backbone.fingerprint}}
    save_checkpoint(tmp_path / "checkpoint", head, config, {})
    assert type(load_head(tmp_path, backbone)[0]) is head_class("far_one")


def test_several_folders_are_searched(outside, tmp_path, monkeypatch):
    outside("far_two")
    outside("far_three", root=tmp_path / "other")
    assert "far_three" not in available()
    several = [os.environ["GORGON_HEADS"], "", str(tmp_path / "other"), str(tmp_path / "other" / ".."), str(FOLDER)]
    monkeypatch.setenv("GORGON_HEADS", os.pathsep.join(several))
    assert {"far_two", "far_three", "mlp"} < {*available()}
    assert head_class("far_two") is not head_class("far_three")


def test_without_the_variable_a_head_of_the_repository_is_still_found(monkeypatch):
    for value in ("", os.pathsep):
        monkeypatch.setenv("GORGON_HEADS", value)
        assert available() == sorted(path.parent.name for path in FOLDER.glob("*/head.py"))
    monkeypatch.delenv("GORGON_HEADS")
    with pytest.raises(ValueError, match=r"Unknown head 'far_of'\. Available: .*GORGON_HEADS is not set"):
        head_class("far_of")


def test_a_folder_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GORGON_HEADS", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"GORGON_HEADS names '.*nowhere', which is not a folder"):
        available()


def test_a_variable_that_names_the_head_itself_is_refused(outside, monkeypatch):
    folder = outside("far_four")
    monkeypatch.setenv("GORGON_HEADS", str(folder))
    with pytest.raises(ValueError, match=r"names the head '.*far_four' itself; name the folder around it, .*mine$"):
        available()


def test_two_heads_of_one_name_are_refused(outside, tmp_path, monkeypatch):
    outside("mlp")
    with pytest.raises(ValueError, match=r"two heads are called 'mlp': .*heads/mlp and .*mine/mlp; rename one"):
        folders()


@pytest.mark.parametrize(
    ("name", "code", "package", "message"),
    [
        ("bad_one", None, '"""No class."""', r"bad_one/__init__\.py must define HEAD = "),
        ("bad_two", None, "HEAD = 3", r"bad_two/__init__\.py: HEAD must be a subclass of heads\.base\.Head, got 3"),
        ("bad_three", None, "HEAD = dict", r"HEAD must be a subclass of heads\.base\.Head, got <class 'dict'>"),
        ("bad_four", "\nimport no_such_module\n", None, r"bad_four cannot be imported: ModuleNotFoundError: .*no_such"),
        ("bad_five", "\n\nx = nothing\n", None, r"NameError: name 'nothing' is not defined \(head\.py line 3\)"),
        ("bad_six", "x = (\n", None, r"bad_six cannot be imported: SyntaxError: .*head\.py, line 1"),
        ("bad_seven", "from heads.base import Head as BadSevenHead", None, "Head needs a Config"),
        ("bad_eight", CODE.replace("num_depths:", "depths:").replace("{name}", "BadEightHead"), None, "num_depths"),
        ("base", None, None, r"mine/base needs another name: heads\.base is .*heads/base\.py"),
    ],
)
def test_a_broken_head_is_named_and_the_others_can_still_be_listed(outside, capsys, name, code, package, message):
    outside(name, code, package)
    with pytest.raises(ValueError, match=message) as caught:
        head_class(name)
    assert name in str(caught.value)
    assert run_entry(train.main, ["--list-heads"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines[name].split()[1] == "broken" and lines["mlp"].split()[1] == "parallel"
    assert "broken" not in lines["mlp"] and len(lines) == len(available())
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and f"options of head {name}: broken: " in text and "--head.num_layers" in text
    assert run_entry(train.main, ["--head", name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_checkpoint_of_a_head_that_is_not_found_names_the_variable(outside, backbone, tmp_path, monkeypatch):
    outside("far_five")
    config = {"head": "far_five", "head_config": {}, "backbone": {"fingerprint": backbone.fingerprint}}
    save_checkpoint(tmp_path / "checkpoint", build("far_five", {}, backbone), config, {})
    monkeypatch.delenv("GORGON_HEADS")
    with pytest.raises(ValueError, match=r"Unknown head 'far_five'.*GORGON_HEADS is not set"):
        load_head(tmp_path, backbone)


def test_a_chain_outside_the_repository_is_found(outside, backbone):
    folder = outside("far_six")
    head = build("far_six", {}, backbone)
    assert chain_writer(type(head)) is None
    (folder / "chain.py").write_text("def write_chain(head, tape, num_depths):\n    return False\n")
    assert chain_writer(type(head)).__module__ == "heads.far_six.chain"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("far_seven", "\nx = nothing\n", r"far_seven cannot be imported: NameError: .*\(chain\.py line 2\)"),
        ("far_eight", "x = 3\n", r"far_eight/chain\.py must define write_chain"),
    ],
)
def test_a_broken_chain_is_named(outside, backbone, name, code, message):
    (outside(name) / "chain.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        chain_of(build(name, {}, backbone), 2, "float16")


# No file knows a head by name


def literals(tree):
    """(line, string) of every string literal except docstrings and other strings that are statements."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.lineno, node.value


def named_heads(source, path, names):
    """Where a file outside a head's own folder holds that head's name. path: relative to the root, with slashes."""
    parts = PurePosixPath(path).parts
    own = parts[1] if parts[0] == "heads" and len(parts) > 2 else None
    found = [(line, text) for line, text in literals(ast.parse(source)) if text in names and text != own]
    return [f"{path}:{line} names the head {text!r}; let the head say what it is" for line, text in found]


# Files about one head: it in another framework, its published files, a GPU checked with it.
EXEMPT = ("bench/peers/", "heads/formats/", "bench/gpu/steps.py")


def project_files():
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + sorted(ROOT.glob("*.py"))
    names = [path.relative_to(ROOT).as_posix() for path in files]
    return [name for name in names if not name.startswith(EXEMPT)]


def names_in_the_repository():
    return {path.parent.name for path in FOLDER.glob("*/head.py")}


def test_no_file_outside_a_heads_folder_holds_its_name():
    files = project_files()
    assert {"train.py", "bench/run.py", "heads/mlp/head.py", "trainer/fit.py"} < {*files}
    names = names_in_the_repository()
    found = [p for path in files for p in named_heads((ROOT / path).read_text(encoding="utf-8"), path, names)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trainer/fit.py", 'if config.head == "mlp":\n    pass'),
        ("bench/run.py", 'SPECIAL = {"gated_rnn": 3}'),
        ("train.py", 'rates = dict(zip(("prompt_lookup",), (1,)))'),
        ("heads/base.py", 'def f(name="mlp"): ...'),
        ("heads/gated_rnn/head.py", 'build("mlp", {}, None)'),
        ("decoding/draft.py", 'f"{name}" + f"{x if x else \'mlp\'}"'),
    ],
)
def test_a_planted_name_is_found(path, source):
    before = (ROOT / path).read_text(encoding="utf-8")
    found = named_heads(f"{before}\n{source}\n", path, names_in_the_repository())
    assert len(found) == 1 and found[0].startswith(f"{path}:"), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("heads/mlp/head.py", 'print("mlp")'),
        ("trainer/fit.py", '"""mlp"""'),
        ("trainer/fit.py", 'def f():\n    """Such as \'mlp\'."""'),
        ("bench/run.py", 'print("not the mlp alone")'),
    ],
)
def test_a_head_may_name_itself_and_a_docstring_any(path, source):
    assert named_heads(source, path, names_in_the_repository()) == []
