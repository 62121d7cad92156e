"""The update of the parameters: optimizers, learning rates, averages. Door: `optimizer.py`."""
