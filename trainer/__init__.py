"""Training: data, features, losses, optimizer and the one loop of every head. Door: `session.py`."""
