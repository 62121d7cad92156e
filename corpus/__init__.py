"""Corpora that the backbone generates. Door: `write.py`, run by `python -m corpus`."""
