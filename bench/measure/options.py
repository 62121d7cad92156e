"""The options of the commands that decode prompts; reading and checking them loads no Jittor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from backbone.engines import JITTOR
from backbone.options import BackboneOptions
from bench.record.files import ROOT, project_path
from bench.record.prompts import PromptSet, join_prompt_sets, load_prompts, spread
from decoding.options import DecodingOptions
from runtime.options import option

DEFAULT_PROMPTS = ROOT / "assets" / "prompts" / "chat.jsonl"


@dataclass
class PromptOptions:
    """Which prompts are decoded."""

    prompts: list[str] = option(
        [], "prompt file; may be repeated; without: the embedded one", repeat=True, metavar="FILE"
    )
    num_prompts: int | None = option(
        None, "use this many prompts, spread over the categories; without: all", metavar="N", least=1
    )

    @property
    def prompt_source(self) -> str:
        """The prompt files, as records name them."""
        return " + ".join(project_path(file) for file in self.prompts or [DEFAULT_PROMPTS])

    def read_prompts(self, seed: int = 0) -> PromptSet:
        """The prompts, of one file or several, with a note on records that were left out. Raises as
        ``bench.record.prompts.load_prompts`` does."""
        files = self.prompts or [DEFAULT_PROMPTS]
        if len(files) == 1:
            found = load_prompts(files[0], self.num_prompts, seed)
        else:
            found = join_prompt_sets([load_prompts(file) for file in files])
            if self.num_prompts is not None:
                found = dataclasses.replace(found, prompts=tuple(spread(found.prompts, self.num_prompts, seed)))
        if found.notes:
            from bench.tables.terminal import note  # late: rich, which --help does not need

            for line in found.notes:
                note(f"note: {line}")
        return found


@dataclass
class RunOptions(BackboneOptions, PromptOptions, DecodingOptions):
    """The options of bench/run.py."""

    head: list[str] = option(
        [], "measure this head (its latest checkpoint); may be repeated", repeat=True, metavar="NAME"
    )
    checkpoint: list[str] = option([], "measure this checkpoint; may be repeated", repeat=True, metavar="DIR")
    runs: str = option("runs", "where train.py writes its runs", metavar="DIR")
    seed: int = option(0, "of the sample of --num-prompts, and of sampled texts", metavar="N", least=0, below=2**32)
    repeats: int = option(1, "times each prompt is decoded; the median counts", metavar="N", least=1)
    out: str | None = option(None, "result file, for a single head", metavar="FILE")
    out_dir: str | None = option(None, "folder of the results, <head>.json each (default: results)", metavar="DIR")

    def check(self) -> None:
        """Raises ValueError for options that exclude each other."""
        self.check_storage()
        self.check_tree()
        if self.batch_size > 1 and self.backbone_engine != JITTOR:
            raise ValueError(f"--batch-size {self.batch_size} needs --backbone-engine {JITTOR}; the other takes 1")
        if self.out and self.out_dir:
            raise ValueError("--out names one file and --out-dir a folder; give one of them")

    def output_path(self, name: str) -> Path:
        """Where the result of ``name`` goes."""
        return Path(self.out) if self.out else Path(self.out_dir or "results") / f"{name}.json"
