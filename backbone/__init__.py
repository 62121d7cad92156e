"""The frozen backbone: config, model, cache, strict loading, tokenizer and chat template. Door: `model.py`."""
