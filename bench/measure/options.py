"""The options of bench/run.py: read, checked and turned into values before anything is loaded that takes long."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from backbone.engines import ENGINES, HELP, JITTOR
from bench.measure.rules import SAMPLED, add_options
from bench.measure.trees import DYNAMIC
from bench.record.prompts import PromptSet, join_prompt_sets, load_prompts, spread
from runtime.entry import Parser

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_PROMPTS = ROOT / "assets" / "prompts" / "chat.jsonl"
DEFAULT_NODES = 16
# Rows of the key-value cache where the backbone has that many positions; a 7B's then takes 1 GiB in float16.
DEFAULT_CACHE = 2048
DRAFT_DTYPES = ("float16", "float32")
DESCRIPTION = "Measure trained heads against autoregressive decoding of the same prompts; one result file per head."


def add_backbone_options(add: Callable[..., None]) -> None:
    """Where runs lie and which backbone is loaded, and how. add: flag, help, settings of ``add_argument``."""
    add("--runs", "where train.py keeps its runs", metavar="DIR", default="runs")
    add("--backbone", "Hugging Face directory of the backbone; without: the embedded tiny-vicuna", metavar="DIR")
    add("--dtype", "of the backbone's weights and cache", choices=("float16", "float32"), default="float16")
    add("--load-in-8bit", "keep the matrices of the backbone's layers in int8, a scale per row", action="store_true")
    add("--load-in-4bit", "keep them in nf4, a scale per 64 weights of a row", action="store_true")
    add("--backbone-engine", HELP, choices=ENGINES, default=JITTOR)
    add("--template", "chat template by name; without: the tokenizer's own", metavar="NAME")


def build_parser() -> Parser:
    """The options of this entry."""
    parser = Parser(prog="bench/run.py", description=DESCRIPTION, allow_abbrev=False)

    def add(flag: str, help: str, **settings) -> None:
        default = settings.get("default")
        parser.add_argument(flag, help=help if default is None else f"{help} (default: {default})", **settings)

    add_options(add)
    add("--head", "measure this head (its latest checkpoint); may be repeated", metavar="NAME", action="append")
    add("--checkpoint", "measure this checkpoint; may be repeated", metavar="DIR", action="append")
    add_backbone_options(add)
    add("--prompts", "prompt file; may be repeated; without: the embedded one", metavar="FILE", action="append")
    add("--num-prompts", "use this many prompts, spread over the categories; without: all", metavar="N", type=int)
    add("--max-new-tokens", "longest reply of a turn", metavar="N", type=int, default=128)
    add("--nodes", f"tree budget, root included; 1: no draft (default: {DEFAULT_NODES})", metavar="N", type=int)
    add("--tree", "auto: as bench/calibrate.py chose; dynamic; chain:K; or a JSON file of rank paths", metavar="TREE")
    least = "leave nodes out of a dynamic tree that the head is less sure of, 0 to 1 (default: 0)"
    add("--min-confidence", least, metavar="P", type=float)
    chains = "of the copy of the head's matrices that drafts a chain in one call (--tree chain:K, or auto)"
    add("--draft-dtype", chains, choices=DRAFT_DTYPES, default=DRAFT_DTYPES[0])
    add("--batch-size", "prompts that are decoded at once", metavar="N", type=int, default=1)
    cache_help = f"rows of the key-value cache (default: the backbone's positions, at most {DEFAULT_CACHE})"
    add("--cache-length", cache_help, metavar="N", type=int)
    add("--seed", "of the sample that --num-prompts takes, and of drawn texts", metavar="N", type=int, default=0)
    add("--repeats", "times each prompt is decoded; the median counts", metavar="N", type=int, default=1)
    add("--out", "result file, for a single head", metavar="FILE")
    add("--out-dir", "folder of the results, <head>.json each (default: results)", metavar="DIR")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked options. Raises ValueError for unknown ones, with a suggestion, and for values that make no run."""
    options = build_parser().parse_args(arguments)
    least_values = {"nodes": 1, "max_new_tokens": 1, "num_prompts": 1, "repeats": 1, "cache_length": 2, "batch_size": 1}
    for name, least in least_values.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must lie between 0 and 2**32 - 1, got {options.seed}")
    if options.batch_size > 1 and options.backbone_engine != JITTOR:
        raise ValueError(f"--batch-size {options.batch_size} needs --backbone-engine {JITTOR}; the other takes 1")
    if options.out and options.out_dir:
        raise ValueError("--out names one file and --out-dir a folder; give one of them")
    if options.tree not in (None, DYNAMIC) and options.nodes is not None:
        raise ValueError("--tree already says how many nodes there are; drop --nodes")
    if options.min_confidence is not None and options.tree != DYNAMIC:
        raise ValueError(f"--min-confidence needs --tree {DYNAMIC}, got {options.tree or 'no --tree'}")
    if options.tree == DYNAMIC and options.draft == SAMPLED:
        raise ValueError(f"--draft {SAMPLED} needs a tree that is fixed before it is drawn, got --tree {DYNAMIC}")
    return options


def read_prompts(options: argparse.Namespace) -> PromptSet:
    """The prompts of the run, from one file or several."""
    files = options.prompts or [DEFAULT_PROMPTS]
    if len(files) == 1:
        return load_prompts(files[0], options.num_prompts, options.seed)
    joined = join_prompt_sets([load_prompts(file) for file in files])
    if options.num_prompts is None:
        return joined
    return dataclasses.replace(joined, prompts=tuple(spread(joined.prompts, options.num_prompts, options.seed)))


def output_path(options: argparse.Namespace, name: str) -> Path:
    """Where the result of ``name`` goes."""
    return Path(options.out) if options.out else Path(options.out_dir or "results") / f"{name}.json"


def project_path(path: str | Path) -> str:
    """A path as records hold it: relative to the project where it lies inside, else as it was given."""
    resolved = Path(path).resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else str(path)
