"""Training text: from files of every kind to token ids with a loss mask. Door: `tokens.py`."""
