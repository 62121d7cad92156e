"""Conversion of backbones between formats. ``weight_convert.py`` is the command line. Door: `convert.py`."""

from backbone.files.layout import BIN, META, PICKLE, SAFETENSORS
from backbone.formats.convert import ConvertOptions, convert
from backbone.formats.source import open_source, recognize
from backbone.formats.verify import verify

FORMATS = {
    SAFETENSORS: "a Hugging Face folder: config.json, model.safetensors or shards with an index, the tokenizer's files",
    BIN: "a Hugging Face folder: config.json, pytorch_model.bin or shards with an index, the tokenizer's files",
    META: "Meta's folder: params.json, consolidated.00.pth ...; written as one shard, with a config.json",
    PICKLE: "one .pkl that jittor.load reads: a dict of NumPy arrays by Hugging Face name, and config; float16",
}

__all__ = ["FORMATS", "ConvertOptions", "convert", "open_source", "recognize", "verify"]
