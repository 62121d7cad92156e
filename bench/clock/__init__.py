"""What passes, losses and conversions cost, beside what the machine allows. Door: `engine.py`."""
