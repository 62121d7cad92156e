"""The house rules that a reader of one file cannot see: which way imports point, and who may know a head by name."""

import ast
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Rooms and what each may import besides itself. A pure helper of a room (runtime.entry, say) counts as the room.
BELOW = {
    "runtime": set(),
    "ops": {"runtime"},
    "backbone": {"runtime", "ops"},
    "heads": {"runtime", "ops", "backbone"},
    "decoding": {"runtime", "ops", "backbone", "heads"},
    "trainer": {"runtime", "ops", "backbone", "heads"},
    "corpus": {"runtime", "ops", "backbone", "heads", "decoding", "trainer"},
    "bench": {"runtime", "ops", "backbone", "heads", "decoding", "trainer"},
}
MOST_LINES, MOST_FILES = 400, 14
ENTRIES = {path.stem for path in ROOT.glob("*.py")}
HEADS = {path.parent.name for path in (ROOT / "heads").glob("*/head.py")}
REGISTRY = "heads/registry.py"
DOCUMENTS = "runtime/files/documents.py"


def project_files():
    """Python files of the rooms and the entries, as paths relative to the root."""
    rooms = [path for room in BELOW for path in sorted((ROOT / room).rglob("*.py"))]
    return [str(path.relative_to(ROOT)) for path in rooms + sorted(ROOT.glob("*.py"))]


def imported_modules(tree, path):
    """(line, dotted name) of everything imported, ``from a import b`` as a.b; relative imports spelled out."""
    package = PurePosixPath(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                name = node.args[0]
                if isinstance(name, ast.JoinedStr) and name.values and isinstance(name.values[0], ast.Constant):
                    yield node.lineno, f"{name.values[0].value}*"
                elif isinstance(name, ast.Constant) and isinstance(name.value, str):
                    yield node.lineno, name.value


def compared_strings(tree):
    """(line, string) of every string literal that a comparison or a match looks for."""
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        for part in parts:
            for leaf in part.elts if isinstance(part, (ast.Tuple, ast.List, ast.Set)) else [part]:
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield node.lineno, leaf.value


def problems_of(source, path):
    """What is wrong with one file. path: relative to the root, with slashes."""
    tree, parts, problems = ast.parse(source), PurePosixPath(path).parts, []
    room = parts[0] if len(parts) > 1 else None
    own_head = parts[1] if room == "heads" and len(parts) > 2 else None
    for line, name in imported_modules(tree, path):
        words = name.split(".")
        if words[0] in ("jittor", "jittor_utils") and room != "runtime":
            problems.append(f"{path}:{line} imports {name}; only runtime imports Jittor")
        if words[0] in ("json", "yaml") and path != DOCUMENTS:
            problems.append(f"{path}:{line} imports {name}; files are read and written through {DOCUMENTS}")
        if words[0] in BELOW and room and words[0] != room and words[0] not in BELOW[room]:
            problems.append(f"{path}:{line} imports {name}; {room} may import {', '.join(sorted(BELOW[room]))}")
        if room and words[0] in ENTRIES:
            problems.append(f"{path}:{line} imports {name}; nothing imports an entry")
        by_name = words[0] == "heads" and len(words) > 1 and (words[1] in HEADS or words[1].startswith("*"))
        if by_name and words[1] != own_head and not (path == REGISTRY and words[1] == "*"):
            problems.append(f"{path}:{line} imports {name}; a head is reached through heads.registry")
    for line, text in compared_strings(tree):
        if text in HEADS and text != own_head:
            problems.append(f"{path}:{line} compares with the head name {text!r}; let the head say what it is")
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            problems.append(f"{path}:{node.lineno} has a bare except")
    return problems


def arrows(sources):
    """{file: files of the project it imports}. sources: {path relative to the root: text}.

    ``from a.b import c`` is an arrow to a/b/c.py where that is a file, else to a/b.py, else to a/b/__init__.py.
    """
    files = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    found = {}
    for path, source in sources.items():
        names = [name for _, name in imported_modules(ast.parse(source), path)]
        targets = {files.get(name) or files.get(name.rpartition(".")[0]) for name in names}
        found[path] = targets - {None, path}
    return found


def circles(graph):
    """Groups of nodes that reach one another, each sorted. graph: {node: nodes it points at}."""
    reach = {node: set() for node in graph}
    for start, seen in reach.items():
        todo = [start]
        while todo:
            for target in graph.get(todo.pop(), set()) - seen:
                seen.add(target)
                todo.append(target)
    return sorted(
        {
            tuple(sorted({node} | {o for o in seen if node in reach.get(o, ())}))
            for node, seen in reach.items()
            if node in seen
        }
    )


def neighbours(graph, folder):
    """The graph of what lies in one folder: its files, and each folder in it as a single node."""

    def node(path):
        parts = PurePosixPath(path).relative_to(folder).parts
        return parts[0] if len(parts) == 1 else f"{parts[0]}/"

    inside = {path: node(path) for path in graph if path.startswith(f"{folder}/")}
    found = {name: set() for name in inside.values()}
    for path, name in inside.items():
        found[name] |= {inside[target] for target in graph[path] if target in inside} - {name}
    return found


def circles_of(sources):
    """Every circle of imports, between files and between the neighbours in a folder, in words."""
    graph = arrows(sources)
    folders = sorted({str(parent) for path in graph for parent in PurePosixPath(path).parents} - {"."})
    found = [" <-> ".join(circle) for circle in circles(graph)]
    return found + [f"{folder}: {' <-> '.join(c)}" for folder in folders for c in circles(neighbours(graph, folder))]


def read_files(paths):
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}


def test_no_circle_between_files_or_between_the_folders_of_a_room():
    assert not circles_of(read_files(project_files())), "\n".join(circles_of(read_files(project_files())))


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"ops/a.py": "import ops.b", "ops/b.py": "def f():\n    from ops.a import g"}, "ops/a.py <-> ops/b.py"),
        ({"ops/__init__.py": "from ops.a import x", "ops/a.py": "import ops"}, "ops/__init__.py <-> ops/a.py"),
        (
            {
                "ops/a/one.py": "import ops.b.one",
                "ops/b/one.py": "",
                "ops/b/two.py": "from ops.a import three",
                "ops/a/three.py": "",
            },
            "ops: a/ <-> b/",
        ),
        (
            {"ops/top.py": "import ops.a.one", "ops/a/one.py": "", "ops/a/two.py": "import ops.top"},
            "ops: a/ <-> top.py",
        ),
    ],
)
def test_a_circle_is_reported(sources, circle):
    assert circle in circles_of(sources)


def test_arrows_that_point_one_way_are_no_circle():
    assert not circles_of(
        {"ops/top.py": "from ops.a import one", "ops/a/one.py": "from ops.low import x", "ops/low.py": ""}
    )


def crowded(lines_of):
    """What is too long or too full. lines_of: {path: number of lines}."""
    full = Counter(str(PurePosixPath(path).parent) for path in lines_of if path.endswith(".py"))
    return [f"{path} has {count} lines" for path, count in lines_of.items() if count > MOST_LINES] + [
        f"{folder} has {count} Python files" for folder, count in full.items() if count > MOST_FILES
    ]


def test_no_file_is_too_long_and_no_folder_too_full():
    sources = read_files(
        [*project_files(), *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/*.py")))]
        + [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("ops/**/*.h"))]
    )
    assert not (found := crowded({path: text.count("\n") for path, text in sources.items()})), "\n".join(found)


def test_a_long_file_and_a_full_folder_are_reported():
    assert crowded({"ops/a.py": 400, "ops/b.h": 401}) == ["ops/b.h has 401 lines"]
    assert crowded({f"ops/{index}.py": 1 for index in range(15)}) == ["ops has 15 Python files"]


def test_every_folder_says_what_it_is_for():
    silent = [
        path
        for path in project_files()
        if path.endswith("__init__.py") and not ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    ]
    assert not silent, silent


def test_every_file_keeps_the_rules():
    files = project_files()
    assert len(files) > 30 and REGISTRY in files
    problems = [p for path in files for p in problems_of((ROOT / path).read_text(encoding="utf-8"), path)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/bad.py", "import jittor as jt"),
        ("train.py", "import json"),
        ("trainer/bad.py", "def f():\n    from yaml import safe_load"),
        ("trainer/bad.py", "def f():\n    from jittor import nn"),
        ("ops/bad.py", "from backbone.model import Backbone"),
        ("runtime/bad.py", "import ops"),
        ("backbone/bad.py", "import heads.base"),
        ("heads/bad.py", "from trainer.fit import fit"),
        ("heads/mlp/bad.py", "from decoding import tree"),
        ("decoding/bad.py", "from trainer import loss"),
        ("trainer/bad.py", "if True:\n    import decoding.verify"),
        ("trainer/bad.py", "from ..bench import metrics"),
        ("bench/bad.py", "import train"),
        ("trainer/bad.py", "from heads.mlp.head import MLPHead"),
        ("trainer/bad.py", "from heads import mlp"),
        ("heads/gated_rnn/bad.py", "from heads.mlp import HEAD"),
        ("heads/base.py", "from .mlp import HEAD"),
        ("train.py", "import heads.mlp"),
        ("bench/bad.py", "import importlib\nimportlib.import_module(f'heads.{name}')"),
        ("heads/registry.py", "import heads.mlp"),
        ("trainer/bad.py", "if name == 'mlp':\n    pass"),
        ("bench/bad.py", "x = 1 if name in ('gated_rnn', 'other') else 2"),
        ("train.py", "match name:\n    case 'mlp':\n        pass"),
        ("heads/gated_rnn/bad.py", "assert name != 'mlp'"),
        ("decoding/bad.py", "try:\n    pass\nexcept:\n    pass"),
    ],
)
def test_a_file_that_breaks_a_rule_is_reported(path, source):
    problems = problems_of(source, path)
    assert len(problems) == 1 and problems[0].startswith(f"{path}:"), problems


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime/good.py", "import jittor"),
        (DOCUMENTS, "import json"),
        ("trainer/good.py", "from runtime.entry import suggest\nfrom heads.registry import build\nimport numpy"),
        ("heads/mlp/good.py", "from heads.mlp.head import MLPHead\nok = name == 'mlp'"),
        ("heads/mlp/good.py", "from .head import MLPHead"),
        ("heads/registry.py", "import importlib\nimportlib.import_module(f'heads.{name}').HEAD"),
        ("train.py", "from trainer.config import parse\nfrom bench import record"),
        ("bench/good.py", "from decoding.tree import Tree\nfrom trainer import data\nlabel = 'mlp'"),
        ("ops/good.py", "try:\n    pass\nexcept Exception:\n    pass"),
    ],
)
def test_a_file_that_keeps_the_rules_is_not_reported(path, source):
    assert problems_of(source, path) == []
