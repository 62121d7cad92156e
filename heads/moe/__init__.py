"""Medusa with a mixture of experts: each depth routes the last hidden state to some of the experts all share."""

from heads.moe.head import MoEHead

HEAD = MoEHead
