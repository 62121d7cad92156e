"""Plots of results. Door: `figure.py` sets each of them up; `comparison.py` and `engine.py` draw."""
