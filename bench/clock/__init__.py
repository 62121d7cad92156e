"""What a pass costs, beside what the machine gives. Door: `passes.py`."""
