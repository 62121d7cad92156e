"""Medusa-2 (arXiv 2401.10774, section 2.2): low-rank adapters on the backbone (LoRA, arXiv 2106.09685) learn with the
heads, held to the unadapted backbone by a KL divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from backbone.differentiable import DifferentiableBackbone
from heads.base import Features, HeadOutput, Stage, option
from heads.layers import LowRank
from heads.medusa import MedusaConfig, MedusaHead
from ops.linear_loss import linear_cross_entropy
from ops.row_plan import RowPlan
from ops.training import kl_divergence
from runtime import jt

JOINT = "joint"


@dataclass
class Config(MedusaConfig):
    """Options of the LoRA head."""

    adapter_rank: int = option(16, "of every adapter")
    adapter_alpha: float = option(16.0, "adapters are scaled by this over their rank")
    adapter_rate: float = option(1.0, "learning rate of the adapters, as a share of the heads'")
    joint_share: float = option(0.8, "share of the steps in which adapters and heads learn together")
    kl_weight: float = option(2.0, "weight of KL(unadapted || adapted) of the next token beside the heads' loss")


class LoRAHead(MedusaHead):
    """W' = W + (alpha / r) B A for every matrix of every layer, B = 0 at the start;  x' = the last hidden state with
    W';  logits_k = W_k (x' + SiLU(A_k x' + b_k));  loss = sum_k w_k CE_k + kl_weight KL(LM(x) || LM(x'))

    Stage "heads" trains the heads alone. In stage "joint" the gradient of the heads' loss reaches the adapters with a
    weight that rises as sin(pi/2 * progress). Features from outside are the unadapted backbone's: they are the teacher.
    Drafting takes the features of ``decoding_backbone``.
    """

    Config = Config

    def __init__(self, config: Config, backbone):
        super().__init__(config, backbone)
        if config.adapter_rank < 1:
            raise ValueError(f"adapter_rank must be at least 1, got {config.adapter_rank}")
        if not 0 < config.joint_share <= 1:
            raise ValueError(f"joint_share must lie above 0 and at most at 1, got {config.joint_share}")
        for name in ("adapter_alpha", "adapter_rate", "kl_weight"):
            if not getattr(config, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")
        self.shapes = [{name: m.shape for name, m in block.frozen().items()} for block in backbone.blocks]
        self.adapters = jt.nn.ModuleList([self._adapter(shape) for shapes in self.shapes for shape in shapes.values()])
        self.stage, self.progress = JOINT, 1.0
        self._differentiable = self._merged = None

    def _adapter(self, shape: tuple[int, int]) -> LowRank:
        num_out, num_in = shape
        return LowRank(num_in, num_out, self.config.adapter_rank)

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied with."""
        return self.config.adapter_alpha / self.config.adapter_rank

    def adapter(self, layer: int, name: str) -> LowRank:
        """The adapter of one matrix of one layer."""
        index = sum(len(shapes) for shapes in self.shapes[:layer])
        return self.adapters[index + list(self.shapes[layer]).index(name)]

    def stages(self):
        joint = Stage(JOINT, self.config.joint_share, {"": 1.0, "adapters.": self.config.adapter_rate})
        frozen = {"blocks.": 1.0, "lm_heads.": 1.0}
        return Stage("heads", 1 - self.config.joint_share, frozen), joint

    def enter(self, stage, progress):
        self.stage, self.progress = stage, progress

    def forget_packed(self):
        super().forget_packed()
        self._merged = None

    @property
    def decoding_backbone(self):
        """The backbone with the adapters merged, made on first use after a change of the parameters."""
        if self._merged is None:
            changes = {}
            for layer, shapes in enumerate(self.shapes):
                for name in shapes:
                    adapter = self.adapter(layer, name)
                    changes[layer, name] = self.scale * adapter.up.weight.numpy() @ adapter.down.weight.numpy()
            self._merged = self.borrowed.adapted(changes, "lora")
        return self._merged

    def adapted_hidden(self, token_ids: np.ndarray, lengths: np.ndarray):
        """x' of sequences behind each other, (1, tokens, dim), with gradients to the adapters while training."""
        if not self.is_training():
            plan = RowPlan.sequences(lengths)
            return self.decoding_backbone.forward(token_ids[None], attend=plan, logits=None).hidden
        self._merged = None
        if self._differentiable is None:
            self._differentiable = DifferentiableBackbone(self.borrowed)

        def linear(layer, name, x, weight):
            return weight(x) + self.scale * self.adapter(layer, name)(x)

        return self._differentiable.hidden(token_ids, lengths, linear).unsqueeze(0)

    def execute(self, features, token_ids, positions) -> HeadOutput:
        if self.is_training() and self.stage != JOINT:
            return super().execute(features, token_ids, positions)
        token_ids, lengths = np.asarray(token_ids), self.sequence_lengths(features)
        rows = token_ids[:, : token_ids.shape[1] - self.num_depths].reshape(-1)
        adapted = self.adapted_hidden(rows, lengths)
        if not self.is_training():
            stats = self.surprise(features, adapted, token_ids, positions)
            return HeadOutput(super().execute(Features(adapted), token_ids, positions).logits, stats=stats)
        # Only a part of the gradient goes on into the backbone; the value stays.
        share = math.sin(math.pi / 2 * self.progress)
        told = adapted * share + adapted.detach() * (1 - share)
        output = super().execute(Features(told), token_ids, positions)
        before, after = (self.lm_logits(self.select(x, positions)) for x in (features.hidden, adapted))
        output.aux["backbone_kl"] = kl_divergence(after, before).mean() * self.config.kl_weight
        return output

    def surprise(self, features, adapted, token_ids, positions) -> dict:
        """Nats of the token that follows each position, before and after adaptation: (positions,) NumPy each."""
        following, ones = jt.array(self.following(token_ids, positions, 0)), jt.ones((len(positions),))
        found = {}
        for name, hidden in (("before", features.hidden), ("after", adapted)):
            terms = self.lm_projection(self.select(hidden, positions)).terms
            found[name] = linear_cross_entropy(terms, following, ones)[1].numpy()
        return found

    def describe(self, means):
        """Perplexity of the next token over the held-out replies' positions, before and after adaptation."""
        return {f"perplexity_{name}": float(np.exp(mean)) for name, mean in means.items()}
