"""Results for people: one data frame, tables, plots, projections. Door: `results.py` (`load_results`)."""
