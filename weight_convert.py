"""Convert a backbone or a draft head from one format to another, without loss.

python weight_convert.py SOURCE --to safetensors --out DIR
python weight_convert.py llama-2-7b --to jittor-pkl --out llama.pkl --dtype float16 --verify
python weight_convert.py --list

The format of SOURCE follows from its files. The result appears complete or not at all; notes go to stderr, the last
line of stdout is JSON. Exit status: 0, 1 if --verify found a difference above the tolerance, 2 for a mistake.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backbone.formats import FORMATS, ConvertOptions, convert, recognize, verify
from backbone.formats.cast import FLOATS, KEEP
from backbone.formats.shards import parse_size
from runtime.entry import run_entry, suggest
from runtime.files.documents import to_json
from runtime.options import option, parse_options

DIFFERENT = 1  # exit status
DESCRIPTION = "Convert a backbone or a draft head from one format to another."


def head_formats() -> dict[str, str]:
    """Formats of draft heads, name -> sentence."""
    return importlib.import_module("heads.formats").FORMATS


@dataclass
class Options:
    """The options of this entry."""

    source: str | None = option(
        None, "a folder or a file; its format is recognized", name="source", nargs="?", metavar="SOURCE"
    )
    to: str | None = option(None, "the format to write; --list prints all", metavar="FORMAT")
    out: str | None = option(None, "where to write: a folder, or a file for formats of one file", metavar="PATH")
    source_format: str | None = option(None, "read SOURCE as this format", name="--from", metavar="FORMAT")
    dtype: str | None = option(
        None,
        "of floating-point tensors (default: keep; float16 for backbones in jittor-pkl and for tensorrt-llm-medusa)",
        choices=(*FLOATS, KEEP),
    )
    shard_size: str = option("5GB", "largest weight file, such as 500MB or 2GiB", metavar="SIZE")
    overwrite: bool = option(False, "replace what an earlier conversion wrote to --out")
    verify: bool = option(False, "compare every tensor and the logits of both sides")
    tolerance: float | None = option(
        None,
        "largest difference that --verify allows, relative to the largest magnitude of a tensor or of the logits "
        "(default: 0 if types are equal, else the rounding of the narrower type)",
        metavar="T",
        least=0,
    )
    backbone: str | None = option(
        None, "the backbone that a head belongs to (default: the embedded one)", metavar="DIR"
    )
    merge: bool = option(False, "write complete language-model heads for a head with none or low-rank ones")
    list: bool = option(False, "print every format and leave")

    def check(self) -> None:
        """Raises ValueError for missing or contradictory options."""
        missing = [name for name in ("source", "to", "out") if getattr(self, name) is None]
        if missing and not self.list:
            named = ", ".join("SOURCE" if name == "source" else f"--{name}" for name in missing)
            raise ValueError(f"{named} missing; expected SOURCE --to FORMAT --out PATH, or --list")
        if self.tolerance is not None and not self.verify:
            raise ValueError("--tolerance belongs to --verify; pass both or neither")


def list_formats() -> None:
    """One line per format, backbones first."""
    kinds = {"backbone": FORMATS, "head": head_formats()}
    width = max(len(name) for formats in kinds.values() for name in formats)
    for kind, formats in kinds.items():
        for name, sentence in formats.items():
            print(f"{kind:8}  {name:{width}}  {sentence}")


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def is_backbone(source: str, source_format: str | None) -> bool:
    """Whether SOURCE is a backbone: by --from, or by its files if --from allows both."""
    if source_format is not None:
        kinds = [source_format in formats for formats in (FORMATS, head_formats())]
        if not any(kinds):
            raise suggest("format", source_format, {**FORMATS, **head_formats()})
        if not all(kinds):
            return kinds[0]
    return recognize(source) is not None


def convert_backbone(options: Options, settings: ConvertOptions) -> int:
    """A backbone to one of the backbone formats. Returns the exit status."""
    if options.to not in FORMATS:
        if options.to in head_formats():
            raise ValueError(f"{options.source} is a backbone and {options.to} a format of heads; see --list")
        raise suggest("format", options.to, FORMATS)
    if options.backbone or options.merge:
        raise ValueError(f"--backbone and --merge are for heads, and {options.source} is a backbone; leave them out")
    done = convert(options.source, options.to, options.out, settings, note)
    if done.rounding:
        note(f"rounding: at most {done.rounding:.3g}, in {done.rounding_in}")
    same = None
    if options.verify:
        same = verify(options.source, done.source_format, options.out, options.to, options.tolerance)
    print(to_json({**done.as_dict(), "verified": same}))
    return DIFFERENT if same is False else 0


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit status."""
    options = parse_options(Options, "weight_convert.py", DESCRIPTION, arguments)
    if options.list:
        list_formats()
        return 0
    settings = ConvertOptions(
        options.source_format, options.dtype, parse_size(options.shard_size), options.overwrite, options.verify,
        options.tolerance, options.backbone, options.merge,
    )  # fmt: skip
    if is_backbone(options.source, options.source_format):
        return convert_backbone(options, settings)
    return importlib.import_module("heads.formats").convert(
        Path(options.source), options.to, Path(options.out), settings
    )


if __name__ == "__main__":
    sys.exit(run_entry(main))
