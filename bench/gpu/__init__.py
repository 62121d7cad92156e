"""The checks of a machine with a GPU. Door: `checks.py`."""
