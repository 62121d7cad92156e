"""An LSTM cell that predicts the next feature from the last one and the drafted token, as EAGLE does."""

from heads.lstm_eagle.head import LSTMEagleHead

HEAD = LSTMEagleHead
