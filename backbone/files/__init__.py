"""What weight files hold, read lazily and without running anything in them. Door: `lazy.py`."""
