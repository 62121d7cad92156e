"""How a head is measured: prompts are decoded with and without it, timed and compared. Door: `recorder.py`."""
