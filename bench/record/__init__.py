"""What a result holds: the schema of its JSON, its metrics, the prompts. Door: `schema.py`."""
