"""What a head is trained on: the backbone's features and distributions, cached. Door: `cache.py`."""
