"""What a run would take in memory, disk and time, measured by one step. Door: `run.py`."""
