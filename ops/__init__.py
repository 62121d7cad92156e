"""Kernels of decoding and training, one Python file per operation. Door: `decoder_pass.py`; C++ in `kernels/`."""
