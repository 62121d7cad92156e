"""How frozen weights are stored: rounding to 8 and 4 bits, layouts of the kernels. Door: `quantize.py`."""
