"""The options of a training run, read from four places: defaults, the head's recipe, a YAML file, the command line.

Later places win. Loads no Jittor.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backbone.engines import JITTOR, prepare_engine
from backbone.options import BackboneOptions
from heads.registry import available, head_class, head_folder, make_config
from runtime.entry import Parser, suggest
from runtime.files.documents import read_yaml
from runtime.files.shown import shown
from runtime.options import add_options, check_options, option, option_fields

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED_CORPUS = ROOT / "assets" / "corpus" / "chat.jsonl.gz"
LOSSES = ("ce", "kl", "mix")
OPTIMIZERS = ("adamw", "lion", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
MOST_RANKS = 256  # more than any machine has GPUs; mpirun takes memory for each before it starts the first


@dataclass
class TextOptions(BackboneOptions):
    """Which text is read, how it is tokenized, and how much of it is held out."""

    data: list[str] = option(
        [],
        "ShareGPT or text records as JSON, JSON lines or Parquet, plain .txt (.gz too, except for Parquet), datasets "
        "folders (FOLDER:split); without: the embedded corpus",
    )
    data_weights: list[float] = option(
        [], "how often an epoch takes the sequences of each file; without: once", metavar="N"
    )
    block_size: int = option(1024, "tokens of the blocks that plain text is cut into", least=3)
    loss_on: str = option(
        "assistant",
        "tokens that carry loss: the assistant's, or all; in plain text all of them always do",
        choices=("assistant", "all"),
    )
    max_length: int = option(512, "tokens after which a conversation is truncated", least=3)
    held_out: int = option(256, "conversations kept out of training to score on", above=0)

    def check_text(self) -> None:
        """Raises ValueError for options that exclude each other and for weights that do not fit the files."""
        self.check_storage()
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ValueError(f"--data-weights has {len(self.data_weights)} numbers, --data {len(self.data)} files")
        if any(not (math.isfinite(w) and w > 0) for w in self.data_weights):
            raise ValueError(f"--data-weights must be numbers above 0, got {self.data_weights}")


@dataclass
class OutputOptions:
    """Where a run's files go and what happens to those of an earlier run. None of these changes what is trained."""

    out: str | None = option(None, "directory of the run; without: runs/<head>/<time>")
    overwrite: bool = option(False, "replace the checkpoint that --out already holds")
    resume: bool = option(False, "resume the run in --out (without: the head's newest) from its last state")
    dry_run: bool = option(False, "load everything, take one step, print what the run will need, and stop")
    cache_dir: str = option(str(Path(".cache") / "features"), "directory of the feature caches")
    save_every: int = option(250, "steps between states to resume from; 0: none", least=0)
    keep_last: int = option(1, "number of states kept, the newest ones", above=0)
    ranks: int = option(
        1, "processes on this machine that share each step's text, through Open MPI", above=0, most=MOST_RANKS
    )
    tensorboard: bool = option(False, "also write TensorBoard events into the run's directory")


@dataclass
class TrainConfig(OutputOptions, TextOptions):
    """Everything that decides a run. The head's own options are in ``head_options``."""

    head: str = option("", "which head to train; see --list-heads")
    epochs: float = option(1.0, "passes over the training text", above=0)
    max_steps: int = option(0, "stop after this many optimizer steps; 0: --epochs decides", least=0)
    tokens_per_step: int = option(2048, "tokens of text per optimizer step, over all passes and ranks", above=0)
    accumulate: int = option(1, "forward and backward passes per optimizer step, on each rank", above=0)
    score_every: int = option(250, "steps between scores on the held-out text", above=0)
    loss: str = option(
        "mix",
        "of each depth: ce (the text's token), kl (the backbone's distribution), or mix of both",
        choices=LOSSES,
    )
    kl_share: float = option(0.5, "weight of the backbone's distribution in --loss mix", least=0, most=1)
    kl_top: int = option(32, "most probable tokens of the backbone's distribution that --loss kl and mix use", above=0)
    teacher: str | None = option(
        None, "top-k file written by python -m corpus; without: the backbone computes the distributions"
    )
    optimizer: str = option("adamw", "adamw, lion or muon (matrices by muon, the rest by adamw)", choices=OPTIMIZERS)
    learning_rate: float = option(2e-3, "peak of the schedule", above=0)
    schedule: str = option(
        "cosine", "of the learning rate after the warm-up: cosine, linear, wsd or constant", choices=SCHEDULES
    )
    decay_share: float = option(0.2, "share of the steps over which --schedule wsd decays at the end", least=0, most=1)
    final_rate: float = option(0.05, "learning rate at the end, as a share of the peak", least=0, below=1)
    warmup: float = option(0.05, "share of the steps over which the learning rate rises", least=0, below=1)
    weight_decay: float = option(0.05, "decoupled from the gradient, on matrices only", least=0)
    beta1: float = option(0.9, "of AdamW and Lion; the momentum of Muon", least=0, below=1)
    beta2: float = option(0.95, "of AdamW and Lion", least=0, below=1)
    ema: float = option(
        0.0, "decay of a moving average of the weights, which is then scored and saved; 0: none", least=0, below=1
    )
    clip: float = option(1.0, "largest norm of the gradient; 0: no clipping", least=0)
    skip_limit: int = option(3, "consecutive updates that may be skipped because they are not finite", above=0)
    depth_weight: float = option(0.9, "weight of depth k in the loss is this to the power k", above=0, most=1)
    features: str = option(
        "cache",
        "cache: backbone features are written to disk once; online: computed at every step",
        choices=("cache", "online"),
    )
    tree_nodes: int = option(16, "node budget of the expected accept length, root included", above=0)
    seed: int = option(0, "of the initial weights and of the order of the data")
    head_options: dict = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError for values that make no run."""
        check_options(self)
        self.check_text()
        make_config(self.head, self.head_options)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """ "name was X, is Y" for every option that differs, except those of the output. A missing one counts as None."""
    names = sorted((set(before) | set(after)) - OUTPUT)
    pairs = [(name, before.get(name), after.get(name)) for name in names]
    return [f"{name} was {shown(old)}, is {shown(new)}" for name, old, new in pairs if old != new]


FIELDS = option_fields(TrainConfig)
OUTPUT = frozenset(option_fields(OutputOptions))
TYPES = typing.get_type_hints(TrainConfig)


def _set(config: TrainConfig, key: str, value, source: str) -> None:
    """Set one field from YAML, with its type checked."""
    if not isinstance(key, str):
        raise ValueError(f"{source}: a key must be text, got {shown(key)}")
    if key.startswith("head."):
        config.head_options[key.removeprefix("head.")] = value
        return
    name = key.replace("-", "_")
    if name not in FIELDS:
        raise suggest(f"key in {source}:", key, [*FIELDS, "head.<option>"])
    wanted = TYPES[name]
    if not _has_type(value, wanted):
        raise ValueError(f"{source}: {key} takes {getattr(wanted, '__name__', wanted)}, got {shown(value)}")
    setattr(config, name, float(value) if wanted is float else value)


def _has_type(value, wanted) -> bool:
    """Whether a YAML value has the type of an option. An integer is accepted for a float."""
    if typing.get_origin(wanted) is list:
        [item] = typing.get_args(wanted)
        return isinstance(value, list) and all(_has_type(each, item) for each in value)
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, int | float if wanted is float else wanted)


def recipe(head: str) -> tuple[str, dict]:
    """The path of the head's ``recipe.yaml``, which holds its measured defaults, and its content, {} without one."""
    path = head_folder(head) / "recipe.yaml"
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return str(shown), read_yaml(path) if path.exists() else {}


def _convert_head_option(head: str, key: str, text: str):
    fields = {f.name: f for f in dataclasses.fields(head_class(head).Config)}
    name = key.replace("-", "_")
    if name not in fields:
        raise suggest(f"option of head {head!r}:", key, fields)
    wanted = type(fields[name].default)
    try:
        if wanted is bool:
            return name, {"true": True, "false": False}[text.lower()]
        return name, wanted(text)
    except (ValueError, KeyError) as error:
        raise ValueError(f"--head.{key} takes {wanted.__name__}, got {text!r}") from error


def _parser(head: str | None) -> Parser:
    parser = Parser(prog="train.py", description="Train one draft head.", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of the options below; the command line wins")
    parser.add_argument("--list-heads", action="store_true", help="print the heads and exit")
    add_options(parser, TrainConfig, suppress=True)
    for name in [head] if head else available():
        group = parser.add_argument_group(f"options of head {name}")
        try:
            options = dataclasses.fields(head_class(name).Config)
        except ValueError as error:
            if head:
                raise
            group.description = f"broken: {error}"
            continue
        for f in options:
            if f"--head.{f.name}" in parser._option_string_actions:
                continue  # without --head, an option that several heads have is listed with the first
            text = f"{f.metadata.get('help', '')} (default: {f.default})"
            group.add_argument(f"--head.{f.name}", dest=f"head.{f.name}", default=argparse.SUPPRESS, help=text)
    return parser


def parse(arguments: Sequence[str]) -> TrainConfig | None:
    """The run that a command line asks for; None when it only asked for --list-heads.

    Raises ValueError for unknown heads, options and values; an unknown option is answered with the nearest one.
    """
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--head")
    first.add_argument("--config")
    first.add_argument("--backbone-engine")
    first.add_argument("--list-heads", action="store_true")
    known, _ = first.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    if known.list_heads:
        return None
    file_options = read_yaml(Path(known.config)) if known.config else {}
    named = known.backbone_engine or file_options.get("backbone_engine", file_options.get("backbone-engine"))
    prepare_engine(str(named or JITTOR))  # before the head's class loads Jittor
    head = known.head or file_options.get("head")
    if head is not None:
        head_class(str(head))  # an unknown head is reported before anything else
    parser = _parser(head)
    if head is None and not {"-h", "--help"} & set(arguments):
        raise ValueError(f"--head NAME is needed; available: {', '.join(available())}")
    options = parser.parse_args(arguments)
    config = TrainConfig()
    for source, values in (recipe(head), (known.config, file_options)):
        for key, value in values.items():
            _set(config, key, value, str(source))
    for name, value in vars(options).items():
        if name in FIELDS:
            setattr(config, name, value)
        elif name.startswith("head."):
            key, converted = _convert_head_option(head, name.removeprefix("head."), value)
            config.head_options[key] = converted
    config.head = head
    config.check()
    return config
