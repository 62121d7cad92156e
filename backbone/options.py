"""Which backbone a command loads, and how its weights are stored. Loads no Jittor until ``load`` is called."""

from __future__ import annotations

from dataclasses import dataclass

from backbone.engines import ENGINES, HELP, JITTOR, load_engine
from runtime.options import option

DTYPES = ("float16", "float32")


@dataclass
class BackboneOptions:
    """The options that every command with a backbone has."""

    backbone: str | None = option(
        None, "directory of the backbone (Hugging Face or Meta); without: the embedded tiny-vicuna", metavar="DIR"
    )
    dtype: str = option("float16", "of the backbone's weights and KV cache", choices=DTYPES)
    load_in_8bit: bool = option(False, "store the layers' matrices in int8, with a scale per row")
    load_in_4bit: bool = option(False, "store them in NF4, with a scale per 64 weights of a row")
    backbone_engine: str = option(JITTOR, HELP, choices=ENGINES)
    template: str | None = option(None, "chat template by name; without: the tokenizer's own", metavar="NAME")

    def check_storage(self) -> None:
        """Raises ValueError when both 8-bit and 4-bit weights are selected."""
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("--load-in-8bit and --load-in-4bit exclude each other; choose one")

    def load(self):
        """The backbone. Raises ValueError as ``backbone.engines.load_engine`` does."""
        return load_engine(self.backbone_engine, self.backbone, self.dtype, self.load_in_8bit, self.load_in_4bit)

    def load_tokenizer(self):
        """Its tokenizer with the chat template. Raises ValueError as ``backbone.tokenizer.load_tokenizer`` does."""
        from backbone.tokenizer import load_tokenizer

        return load_tokenizer(self.backbone, self.template)
