"""The frozen backbone: config, model, key-value cache, strict loading, tokenizer and chat template."""
