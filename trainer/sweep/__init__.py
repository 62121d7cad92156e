"""Searches over the options of `train.py`. Door: `command.py`."""
