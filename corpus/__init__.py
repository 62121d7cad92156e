"""Corpora that the backbone writes itself. Door: `write.py`, run by `python -m corpus`."""
