"""A gated recurrence over the drafted tokens, one set of weights for every depth."""

from heads.gated_rnn.head import GatedRNNHead

HEAD = GatedRNNHead
