"""EAGLE-3: one decoder layer over three fused backbone layers, trained on its own drafts for several depths."""

from heads.eagle3.head import Eagle3Head

HEAD = Eagle3Head
