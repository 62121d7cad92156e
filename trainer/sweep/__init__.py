"""Searches over the options of `train.py`. Door: `study.py`."""
