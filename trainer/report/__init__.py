"""What a run shows and stores of itself: progress, TensorBoard events, `train.json`. Door: `record.py`."""
