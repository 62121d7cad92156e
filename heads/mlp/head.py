"""Medusa-1 (arXiv 2401.10774, section 2.1): each depth guesses from the last hidden state alone."""

from __future__ import annotations

from heads.medusa import MedusaConfig, MedusaHead


class MLPHead(MedusaHead):
    """``heads.medusa.MedusaHead`` on a frozen backbone."""

    Config = MedusaConfig
