"""Hydra: a small residual network per depth, each told every token drafted before it."""

from heads.hydra.head import HydraHead

HEAD = HydraHead
