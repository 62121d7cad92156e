"""The checks of a machine with a GPU. Door: `check.py` runs them; `steps.py` lists them."""
