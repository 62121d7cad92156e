"""Measuring a head: prompts are decoded with it and without, timed and compared. Door: `session.py`."""
