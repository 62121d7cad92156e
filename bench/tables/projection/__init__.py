"""What results, ours and published ones, might come to on another machine. Door: `projection.py`."""
