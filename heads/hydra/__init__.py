"""Hydra: a small residual network per depth, which reads every token drafted before it."""

from heads.hydra.head import HydraHead

HEAD = HydraHead
