"""Small random backbones on disk, as other libraries write them."""

import json

import torch
from safetensors.torch import save_file

from backbone.config import read_config
from backbone.weights import expected_shapes

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TOKENIZER = {"tokenizer.json": b'{"a": 1}', "tokenizer.model": b"\x00\xff\x80", "chat_template.jinja": b"{{ x }}"}


def raw_config(**changes):
    """config.json of a small Llama with grouped queries."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
        "something_of_its_own": {"kept": [1, None]},
    } | changes


def write_model(folder, raw, dtype=torch.float16, seed=0):
    """A random backbone as the safetensors library writes it, with a tokenizer's files. Returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    for name, data in TOKENIZER.items():
        (folder / name).write_bytes(data)
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(read_config(folder)).items()
    save_file(
        {name: (torch.randn(shape, generator=generator) * 0.3).to(dtype) for name, shape in shapes},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def bits(tensors):
    """Everything that must survive a conversion: type, shape and bytes by name. tensors: lazy ones."""
    return {name: (t.dtype, t.shape, t.read().tobytes()) for name, t in tensors.items()}
