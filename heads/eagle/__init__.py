"""EAGLE-1: one decoder layer over (feature, next token), autoregressive on the features it predicts."""

from heads.eagle.head import EagleHead

HEAD = EagleHead
