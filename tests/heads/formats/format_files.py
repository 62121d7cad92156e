"""Published heads in PyTorch, as their own code writes them, and helpers of the converter's tests."""

import json

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from backbone.formats import ConvertOptions
from heads.base import Features
from heads.checkpoint import load_head, save_checkpoint
from heads.formats import convert
from heads.registry import build
from runtime import jt
from tests.small import SMALL, draw_weights, save_hugging_face, small_config

DIM, VOCAB = SMALL["hidden_size"], SMALL["vocab_size"]
ROWS = 6
TOLERANCE = 1e-5  # of the largest logit: float32 sums in two orders


def near(ours, theirs):
    """Whether all depths agree, and there are as many."""
    assert len(ours) == len(theirs)
    return all(np.abs(a - b).max() <= TOLERANCE * np.abs(b).max() for a, b in zip(ours, theirs, strict=True))


def random_checkpoint(path, name, backbone, **options):
    """A checkpoint with random parameters and a config with content; returns its path."""
    head = build(name, options, backbone)
    random = np.random.default_rng(0)
    for _, parameter in sorted(head.trainable().items()):
        parameter.update(jt.array(random.standard_normal(parameter.shape).astype(np.float32) * 0.2))
    trained_on = {"fingerprint": backbone.fingerprint, "path": backbone.path, "hidden_size": DIM, "vocab_size": VOCAB}
    config = {
        "head": name,
        "head_config": vars(head.config),
        "backbone": trained_on,
        "metrics": {"tree": [[0], [0, 0]], "top1": [0.5, 0.25]},
    }
    save_checkpoint(path, head, config, {"seed": 7})
    return path


def change_head(source, backbone, change):
    """Apply ``change`` to the head of a checkpoint and save it again; returns its path."""
    head, config = load_head(source, backbone)
    change(head)
    save_checkpoint(source, head, {key: value for key, value in config.items() if key != "files"}, {})
    return source


def write_backbone(folder, dtype=np.float16, seed=0, **changes):
    """The small backbone as a Hugging Face folder; returns the folder."""
    config = small_config(**changes)
    tensors = {name: tensor.astype(dtype) for name, tensor in draw_weights(config, seed).items()}
    return save_hugging_face(folder, config, tensors)


class ResBlock(torch.nn.Module):
    """x + SiLU(A x + b), under the name that Medusa's files have."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        return x + torch.nn.functional.silu(self.linear(x))


def medusa_heads(num_heads: int, num_layers: int, own_lm_heads: bool = True, seed: int = 0) -> torch.nn.ModuleList:
    """Medusa's heads in the layout of its files, every parameter random."""
    torch.manual_seed(seed)
    last = [lambda: torch.nn.Linear(DIM, VOCAB, bias=False)] if own_lm_heads else []
    blocks = [lambda: ResBlock(DIM)] * num_layers
    return torch.nn.ModuleList([torch.nn.Sequential(*[make() for make in blocks + last]) for _ in range(num_heads)])


def save_medusa(folder, heads, **config):
    """The folder that Medusa's code reads; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(heads.state_dict(), folder / "medusa_lm_head.pt")
    fields = {"medusa_num_heads": len(heads), "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    (folder / "config.json").write_text(json.dumps({**fields, **config}))
    return folder


def hidden_states(rows: int = ROWS, seed: int = 1) -> np.ndarray:
    """(rows, dim) float32."""
    return np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)


def logits_of(head, hidden: np.ndarray, token_ids: np.ndarray | None = None) -> list[np.ndarray]:
    """The logits of one of our heads at every row: (rows, vocab) per depth. token_ids: (rows + depths,)."""
    if token_ids is None:
        token_ids = np.zeros(len(hidden) + head.num_depths, np.int32)
    output = head(Features(jt.array(hidden[None])), token_ids[None], np.arange(len(hidden)))
    return [each.value().numpy() for each in output.logits]


def torch_logits(heads, hidden: np.ndarray, lm_head: np.ndarray | None = None) -> list[np.ndarray]:
    """The logits of Medusa's heads; lm_head: (vocab, dim), for heads without their own."""
    with torch.no_grad():
        outputs = [head(torch.from_numpy(hidden)).numpy() for head in heads]
    return outputs if lm_head is None else [y @ lm_head.T for y in outputs]


def read_folder(folder, file: str) -> dict[str, np.ndarray]:
    """The tensors of a ``.pt`` file, as torch reads them."""
    return {name: t.numpy() for name, t in torch.load(folder / file, weights_only=True).items()}


class EagleLayer(torch.nn.Module):
    """EAGLE-1's layer: transformers' Llama layer without its first norm, after fc. bias: fc has one, as ``bias`` of
    config.json says."""

    def __init__(self, seed: int = 0, bias: bool = True):
        super().__init__()
        torch.manual_seed(seed)
        self.llama = LlamaConfig(
            vocab_size=VOCAB, hidden_size=DIM, intermediate_size=SMALL["intermediate_size"], num_hidden_layers=1,
            num_attention_heads=SMALL["num_heads"], num_key_value_heads=SMALL["num_kv_heads"],
            rms_norm_eps=SMALL["rms_norm_eps"], rope_theta=SMALL["rope_theta"], max_position_embeddings=128,
            attn_implementation="eager", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, hidden_act="silu",
        )  # fmt: skip
        self.fc = torch.nn.Linear(2 * DIM, DIM, bias=bias)
        self.layers = torch.nn.ModuleList([LlamaDecoderLayer(self.llama, 0)])
        self.layers[0].input_layernorm = torch.nn.Identity()
        self.rotary = LlamaRotaryEmbedding(self.llama)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.eval()

    def forward(self, features, embedded):
        """features, embedded: (rows, dim) -> (rows, dim)."""
        x = self.fc(torch.cat([embedded, features], 1))[None]
        rows = x.shape[1]
        mask = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
        positions = torch.arange(rows)[None]
        y = self.layers[0](
            x, attention_mask=mask, position_ids=positions, position_embeddings=self.rotary(x, positions)
        )
        return (y[0] if isinstance(y, tuple) else y)[0]

    def config(self) -> dict:
        """Its config.json, as EAGLE-1's repositories have it."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": DIM,
            "intermediate_size": SMALL["intermediate_size"], "vocab_size": VOCAB, "num_hidden_layers": 1,
            "num_attention_heads": SMALL["num_heads"], "num_key_value_heads": SMALL["num_kv_heads"],
            "rms_norm_eps": SMALL["rms_norm_eps"], "rope_theta": SMALL["rope_theta"], "bos_token_id": 1,
            "eos_token_id": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "bias": True,
        }  # fmt: skip


def run(source, to, out, **changes) -> int:
    """One conversion with some options changed; returns its exit status."""
    return convert(source, to, out, ConvertOptions(**changes))
