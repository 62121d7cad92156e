"""Medusa-1: one small residual network per depth, all depths at once."""

from heads.mlp.head import MLPHead

HEAD = MLPHead
