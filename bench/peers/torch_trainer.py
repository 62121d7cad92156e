"""A training step in plain PyTorch: features of a frozen backbone, the head's loss, its gradients, clipping, AdamW.

torch comes with requirements-dev.txt only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.config import read_config
from backbone.weights import EMBEDDING, LM_HEAD, read_tensors
from bench.clock.timing import interleave
from bench.peers.torch_heads import Batch, DraftHead, Padding, collate
from trainer.config import TrainConfig
from trainer.data.tokens import TokenizedData, batches
from trainer.optim.schedule import rate

ADAMW = {"for loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}  # forms of AdamW
UNPADDED = "unpadded"  # our name for the attention below, as transformers knows it
Source = Callable[[Batch, Sequence[int]], Tensor]  # (batch, its conversations) -> hidden (tokens, dim) float32


def frozen_weights(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and language-model head of a Hugging Face directory, (vocab, dim) float32 each."""
    tied = read_config(directory).tie_embeddings
    found = dict(read_tensors(directory, [EMBEDDING] if tied else [EMBEDDING, LM_HEAD]))
    embedding = found[EMBEDDING].astype(np.float32)
    return embedding, embedding if tied else found[LM_HEAD].astype(np.float32)


# Features -------------------------------------------------------------------------------------------------------------


def unpadded_attention(module, query, key, value, attention_mask, padding: Padding, scaling: float, **_):
    """Causal attention of conversations stored end to end: padded to a batch for ``scaled_dot_product_attention`` only,
    as a mask over all of them would cost the square of their sum. query, key, value: (1, heads, tokens, head_dim) ->
    ((1, tokens, heads, head_dim), None), the form of transformers."""
    q, k, v = (padding.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return padding.unpad(y.transpose(1, 2))[None], None


class OnlineFeatures:
    """transformers' LlamaForCausalLM in float32 at every step, without its language-model head."""

    def __init__(self, directory: Path):
        from transformers import AttentionInterface, AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        AttentionInterface.register(UNPADDED, unpadded_attention)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=UNPADDED)
        self.decoder = model.eval().model

    def __call__(self, batch: Batch, indices: Sequence[int]) -> Tensor:
        tokens, here = batch.tokens[None, : batch.num_tokens], batch.here[None]
        with torch.no_grad():
            output = self.decoder(tokens, position_ids=here, use_cache=False, padding=batch.text)
        return output.last_hidden_state[0]


class CachedFeatures:
    """Float16 files of a feature cache, memory-mapped. files: (path, rows) of each shard, in the order of the text."""

    def __init__(self, files: Sequence[tuple[str, int]], dim: int, offsets: np.ndarray):
        self.offsets = offsets
        self.shards = [torch.from_numpy(np.memmap(path, np.float16, "c", shape=(rows, dim))) for path, rows in files]
        self.firsts = np.cumsum([0, *(rows for _, rows in files)])

    def __call__(self, batch: Batch, indices: Sequence[int]) -> Tensor:
        parts = []
        for index in indices:
            shard = int(np.searchsorted(self.firsts, self.offsets[index], "right")) - 1
            first, last = (self.offsets[[index, index + 1]] - self.firsts[shard]).tolist()
            parts.append(self.shards[shard][first:last])
        return torch.cat(parts).float()


# The step -------------------------------------------------------------------------------------------------------------


def make_adamw(config: TrainConfig, parameters: Sequence[nn.Parameter], form: str) -> torch.optim.AdamW:
    """AdamW with our trainer's settings: matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": 1e-8}
    return torch.optim.AdamW([group for group in groups if group["params"]], **options, **ADAMW[form])


def adamw_trials_ms(config: TrainConfig, head: nn.Module, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of an update by form of AdamW, the least of ``repeats``, on copies of the parameters."""
    updates = {}
    for form in ADAMW:
        copies = [nn.Parameter(p.detach().clone()) for p in head.parameters()]
        for p in copies:
            p.grad = torch.randn_like(p)
        updates[form] = make_adamw(config, copies, form).step
    seconds = interleave(updates, repeats, turn_s=0)
    return {form: min(each) * 1e3 for form, each in seconds.items()}


class TorchTrainer:
    """A head, its optimizer and the text, in the order of our trainer.

    config.max_steps: steps of the complete run, which the learning rate follows; adamw: its form; chunked: whether
    ``F.linear_cross_entropy`` holds a chunk of the logits at a time or all of them; compiled: whether the loss is
    compiled by torch.compile.
    """

    def __init__(
        self,
        config: TrainConfig,
        head: DraftHead,
        data: TokenizedData,
        source: Source,
        adamw: str = "fused",
        chunked: bool = False,
        compiled: bool = False,
    ):
        assert (config.optimizer, config.loss, config.accumulate, config.ema) == ("adamw", "ce", 1, 0), config
        self.config, self.head, self.data, self.source = config, head, data, source
        self.parameters = list(head.parameters())
        self.optimizer = make_adamw(config, self.parameters, adamw)
        self.loss = torch.compile(head.loss, dynamic=True) if compiled else head.loss
        self.options = nn.LinearCrossEntropyOptions() if chunked else None
        self.order, self.done = self._order(), 0

    def _order(self) -> Iterator[list[int]]:
        for epoch in itertools.count():
            yield from batches(self.data, self.config.tokens_per_step, seed=self.config.seed, epoch=epoch)

    def step(self) -> tuple[int, list[float]]:
        """One optimizer step. Returns (tokens of its text, the loss of each depth)."""
        config, indices = self.config, next(self.order)
        batch = collate(self.data, indices, self.head.num_depths)
        total, losses = self.loss(self.source(batch, indices), batch, config.depth_weight, self.options)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(self.parameters, config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(config, self.done, config.max_steps)
        self.optimizer.step()
        self.done += 1
        return batch.num_tokens, losses.tolist()
