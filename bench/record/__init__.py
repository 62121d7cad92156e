"""What result files hold: the schemas of their JSON, the metrics, the prompts. Door: `schema.py`."""
