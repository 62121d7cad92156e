"""What a run shows and keeps of itself: progress, TensorBoard events, `train.json`. Door: `record.py`."""
