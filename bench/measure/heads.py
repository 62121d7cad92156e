"""Which heads are measured: checkpoints by name or directory, and heads that need none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure.options import RunOptions
from bench.measure.tree_choice import Choice, choose_tree
from bench.tables.terminal import note
from decoding.options import DEFAULT_NODES
from decoding.tree import DynamicTree, Tree
from heads.checkpoint import find_checkpoint, latest_checkpoints, read_config
from heads.registry import available, build, head_class, make_config
from runtime.atomic import check_writable

Found = tuple[Path | None, dict[str, Any]]  # a checkpoint's directory and config; None for a head that needs none


@dataclass
class LoadedHead:
    """A head that is ready to be measured. directory: its checkpoint, None without one. stats: its own figures on its
    held-out text."""

    name: str
    directory: Path | None
    config: dict
    head: Any
    choice: Choice
    stats: dict

    @property
    def tree(self) -> Tree | DynamicTree:
        """The tree it drafts."""
        return self.choice.tree


def fresh_config(name: str) -> dict:
    """The config of a head without a checkpoint: its default options."""
    return {"head": name, "head_config": vars(make_config(name, {})), "backbone": {}}


def find_head(name: str, runs: str) -> Found:
    """The latest checkpoint of a head, or its default options if it needs none.

    Raises ValueError for an unknown head and for one that is not trained.
    """
    needs_checkpoint = head_class(name).trained
    directory = latest_checkpoints(Path(runs)).get(name)
    if directory is not None:
        return directory, read_config(directory)
    if needs_checkpoint:
        raise ValueError(f"head {name!r} is not trained: nothing in {runs}; run python train.py --head {name}")
    return None, fresh_config(name)


def find_heads(options: RunOptions) -> list[Found]:
    """What --checkpoint and --head name, else the latest checkpoint of each head and, without --out, each head that
    needs none.

    Raises ValueError for an unknown head, a head without the checkpoint it needs, a directory without a checkpoint, and
    heads whose results would overwrite each other; OSError if a result cannot be written.
    """
    directories = [find_checkpoint(directory) for directory in options.checkpoint]
    found = [(directory, read_config(directory)) for directory in dict.fromkeys(directories)]
    for name in dict.fromkeys(options.head):
        directory, config = find_head(name, options.runs)
        if directory is None or directory not in directories:
            found.append((directory, config))
    found.sort(key=lambda each: each[0] is None)  # trained heads first
    names = [config["head"] for _, config in found]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise ValueError(f"two checkpoints of {repeated} would both be written to {options.output_path(repeated)}")
    if not found:
        found = _all_heads(options)
    for _, config in found:
        check_writable(options.output_path(config["head"]))
    return found


def _all_heads(options: RunOptions) -> list[Found]:
    found = []
    for name, directory in latest_checkpoints(Path(options.runs)).items():
        config = read_config(directory)
        if config["head"] == name:
            found.append((directory, config))
        else:
            note(f"skipped {directory}: it holds the head {config['head']}; pass it as --checkpoint")
    for name in [] if options.out else sorted({*available()} - {config["head"] for _, config in found}):
        try:
            needs_checkpoint = head_class(name).trained
        except ValueError as error:
            note(f"skipped {name}: {error}")
            continue
        if not needs_checkpoint:
            found.append((None, fresh_config(name)))
    return found


def _read_stats(config: dict) -> dict:
    stats = config.get("metrics", {}).get("stats", {})
    if not isinstance(stats, dict):
        raise ValueError(f"the checkpoint of {config['head']} holds no usable stats: expected an object, got {stats!r}")
    return stats


def load_heads(
    options: RunOptions, found: Sequence[Found], backbone, tokenizer, tree: Tree | str | None
) -> list[LoadedHead]:
    """The heads, loaded, each with its tree. tree: the value of --tree.

    A head of another backbone is skipped unless it was named; one that needs no checkpoint is then measured without.
    Raises ValueError for a checkpoint that does not fit the backbone or the tree or has unusable stats, and for several
    heads with --out.
    """
    from decoding.dynamic import check_shape
    from heads.checkpoint import load_head

    loaded = []
    for directory, config in found:
        name, trained_on = config["head"], config["backbone"].get("fingerprint")
        if directory and trained_on != backbone.fingerprint and not options.checkpoint:
            if not head_class(name).trained:
                note(f"skipped {directory}: it is of another backbone; {name} is measured with its defaults")
                directory, config = None, fresh_config(name)
            elif not options.head:
                note(f"skipped {directory}: it was trained on another backbone")
                continue
        head = load_head(directory, backbone)[0] if directory else build(name, config["head_config"], backbone)
        head.eval()
        choice = choose_tree(
            tree, options.nodes or DEFAULT_NODES, directory, config, head, options.runs, options.min_confidence or 0.0
        )
        check_shape(choice.tree, head)
        if directory and config.get("tokenizer", {}).get("fingerprint") != tokenizer.fingerprint:
            note(f"warning: {name} was trained with another tokenizer or chat template; it will draft worse")
        loaded.append(LoadedHead(name, directory, config, head, choice, _read_stats(config)))
    if options.out and len(loaded) > 1:
        raise ValueError(f"--out takes one head, there are {', '.join(each.name for each in loaded)}; use --out-dir")
    if not any(each.head.trained for each in loaded) and not (options.head or options.checkpoint):
        names = ", ".join(each.name for each in loaded) or "autoregressive decoding"
        note(f"no trained head under {options.runs}: only {names} is measured")
        note(f"train one with python train.py --head NAME, where NAME is one of {', '.join(available())}")
    return loaded
