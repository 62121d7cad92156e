"""The options of a training run: defaults, the head's recipe, a YAML file and the command line, in this order."""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from backbone.engines import ENGINES, HELP, JITTOR, prepare_engine
from heads.registry import available, head_class, head_folder, make_config
from runtime.entry import Parser, suggest

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED_CORPUS = ROOT / "assets" / "corpus" / "chat.jsonl.gz"


CHOICES = {
    "backbone_engine": ENGINES,
    "features": ("cache", "online"),
    "loss": ("ce", "kl", "mix"),
    "loss_on": ("assistant", "all"),
    "optimizer": ("adamw", "lion", "muon"),
    "schedule": ("cosine", "linear", "wsd", "constant"),
}


def _option(default, help: str):
    if isinstance(default, list):
        return field(default_factory=list, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """Everything that decides a run, but for the head's own options in ``head_options``."""

    head: str = _option("", "which head to train; see --list-heads")
    backbone: str | None = _option(None, "Hugging Face directory of the backbone; default: the embedded tiny-vicuna")
    dtype: str = _option("float16", "of the backbone's weights and features: float16 or float32")
    load_in_8bit: bool = _option(False, "keep the matrices of the backbone's layers in int8, a scale per row")
    load_in_4bit: bool = _option(False, "keep them in 4 bits, a scale per 64 weights")
    backbone_engine: str = _option(JITTOR, HELP)
    template: str | None = _option(None, "chat template by name; default: the tokenizer's own")
    data: list[str] = _option(
        [],
        "ShareGPT or text records as JSON, JSON lines or Parquet, plain .txt (.gz too, but for Parquet), datasets "
        "folders (FOLDER:split); default: the embedded corpus",
    )
    data_weights: list[float] = _option([], "how often an epoch takes each of the files; default: once")
    block_size: int = _option(1024, "tokens that plain text is cut into")
    loss_on: str = _option("assistant", "whose tokens carry loss: assistant, or all; plain text carries it everywhere")
    out: str | None = _option(None, "directory of the run; default: runs/<head>/<time>")
    overwrite: bool = _option(False, "replace the checkpoint that --out already holds")
    resume: bool = _option(False, "go on with the run in --out (default: the head's newest) where its last state is")
    dry_run: bool = _option(False, "load everything, take one step, print what the run will need, and stop")
    epochs: float = _option(1.0, "passes over the training text")
    max_steps: int = _option(0, "stop after this many optimizer steps; 0: the epochs decide")
    tokens_per_step: int = _option(2048, "tokens of text per optimizer step, over all passes and ranks")
    accumulate: int = _option(1, "passes forward and back that make an optimizer step, on each rank")
    max_length: int = _option(512, "tokens of a conversation that are used")
    held_out: int = _option(256, "conversations kept out of training to score on")
    score_every: int = _option(250, "steps between scores on the held-out text")
    save_every: int = _option(250, "steps between states to resume from; 0: none")
    keep_last: int = _option(1, "states that are kept, the newest ones")
    loss: str = _option("mix", "of each depth: ce (the text's token), kl (the backbone's distribution), or mix of both")
    kl_share: float = _option(0.5, "share of the backbone's distribution in the loss with --loss mix")
    kl_top: int = _option(32, "likeliest tokens of the backbone's distribution that --loss kl and mix look at")
    teacher: str | None = _option(None, "top-k file that corpus.write wrote; default: the backbone on the fly")
    optimizer: str = _option("adamw", "adamw, lion or muon (matrices by muon, the rest by adamw)")
    learning_rate: float = _option(2e-3, "peak of the schedule")
    schedule: str = _option("cosine", "of the learning rate after the warm-up: cosine, linear, wsd or constant")
    decay_share: float = _option(0.2, "share of the steps over which --schedule wsd falls at the end")
    final_rate: float = _option(0.05, "learning rate at the end, as a share of the peak")
    warmup: float = _option(0.05, "share of the steps over which the rate rises")
    weight_decay: float = _option(0.05, "decoupled from the gradient, on matrices alone")
    beta1: float = _option(0.9, "of AdamW and Lion; the momentum of Muon")
    beta2: float = _option(0.95, "of AdamW and Lion")
    ema: float = _option(0.0, "decay of a moving average of the weights, which is then scored and kept; 0: none")
    clip: float = _option(1.0, "largest norm of the gradient; 0: no clipping")
    skip_limit: int = _option(3, "updates in a row that may be skipped because they are not finite")
    depth_weight: float = _option(0.9, "weight of depth k in the loss is this to the power k")
    features: str = _option("cache", "cache: backbone features written to disk once; online: computed at every step")
    cache_dir: str = _option(str(Path(".cache") / "features"), "where feature caches lie")
    tree_nodes: int = _option(16, "node budget of the expected accept length, root included")
    tensorboard: bool = _option(False, "write TensorBoard events into the run's directory too")
    seed: int = _option(0, "of the initial weights and of the order of the data")
    head_options: dict = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError for values that make no run."""
        positive = (
            *("epochs", "tokens_per_step", "accumulate", "held_out", "score_every", "learning_rate", "tree_nodes"),
            *("max_length", "kl_top", "keep_last", "skip_limit"),
        )
        for name in (n for n, f in FIELDS.items() if TYPES[n] is float):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"--{name.replace('_', '-')} must be a number, got {getattr(self, name)}")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        for name in ("max_steps", "clip", "weight_decay", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        for name in ("max_length", "block_size"):
            if getattr(self, name) < 3:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 3, got {getattr(self, name)}")
        for name in ("warmup", "final_rate", "beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 < self.depth_weight <= 1:
            raise ValueError(f"--depth-weight must lie in (0, 1], got {self.depth_weight}")
        for name in ("kl_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1], got {getattr(self, name)}")
        for name, words in CHOICES.items():
            if getattr(self, name) not in words:
                raise suggest(f"--{name.replace('_', '-')}", str(getattr(self, name)), words)
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("--load-in-8bit and --load-in-4bit exclude each other; choose one")
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ValueError(f"--data-weights has {len(self.data_weights)} numbers, --data {len(self.data)} files")
        if any(not (math.isfinite(w) and w > 0) for w in self.data_weights):
            raise ValueError(f"--data-weights must be numbers above 0, got {self.data_weights}")
        make_config(self.head, self.head_options)


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "head_options"}
TYPES = typing.get_type_hints(TrainConfig)


def _set(config: TrainConfig, key: str, value, source: str) -> None:
    """Set one field from YAML, with its type checked."""
    if not isinstance(key, str):
        raise ValueError(f"{source}: a key must be text, got {key!r}")
    if key.startswith("head."):
        config.head_options[key.removeprefix("head.")] = value
        return
    name = key.replace("-", "_")
    if name not in FIELDS:
        raise suggest(f"key in {source}:", key, [*FIELDS, "head.<option>"])
    wanted = TYPES[name]
    plain = {float: (int, float), list[str]: list, list[float]: list, (str | None): (str, type(None))}.get(
        wanted, wanted
    )
    fits = isinstance(value, plain) and not (isinstance(value, bool) and wanted is not bool)
    items = {list[str]: str, list[float]: (int, float)}.get(wanted, object)
    if not fits or (isinstance(value, list) and not all(isinstance(item, items) for item in value)):
        raise ValueError(f"{source}: {key} takes {getattr(wanted, '__name__', wanted)}, got {value!r}")
    setattr(config, name, float(value) if wanted is float else value)


def read_yaml(path: Path) -> dict:
    """A YAML mapping of options. Raises ValueError naming the file."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options to values")
    return content


def recipe(head: str) -> tuple[str, dict]:
    """The head's measured defaults, ``recipe.yaml`` in its folder, empty where it has none, and where they stand."""
    path = head_folder(head) / "recipe.yaml"
    where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return str(where), read_yaml(path) if path.exists() else {}


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
    for name, f in FIELDS.items():
        flag, wanted = f"--{name.replace('_', '-')}", TYPES[name]
        default = "" if f.default is dataclasses.MISSING or f.default in ("", None) else f" (default: {f.default})"
        shared = {"dest": name, "default": argparse.SUPPRESS, "help": f.metadata["help"] + default}
        if wanted is bool:
            parser.add_argument(flag, action="store_true", **shared)
        elif wanted == list[str]:
            parser.add_argument(flag, nargs="+", metavar="FILE", **shared)
        elif wanted == list[float]:
            parser.add_argument(flag, nargs="+", type=float, metavar="N", **shared)
        else:
            kind = {int: int, float: float}.get(wanted, str)
            parser.add_argument(flag, type=kind, metavar=name.upper(), **shared)
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
            flag = f"--head.{f.name}"
            if flag in parser._option_string_actions:
                continue  # without --head, an option that several heads have is listed with the first
            text = f"{f.metadata.get('help', '')} (default: {f.default})"
            group.add_argument(flag, dest=f"head.{f.name}", default=argparse.SUPPRESS, help=text)
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
        head_class(str(head))  # an unknown head is answered before anything else
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
