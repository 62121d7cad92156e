"""Medusa-2: MLP heads trained together with low-rank adapters on the backbone, which decoding merges."""

from heads.lora.head import LoRAHead

HEAD = LoRAHead
