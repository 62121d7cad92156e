"""Results as people read them: tables, plots, projections. Door: `summary.py`."""
