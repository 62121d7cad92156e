"""What a run would need in memory, disk and time, measured by one step. Door: `run.py`."""
