"""Other engines on the same clock, none of them needed for anything else. Door: `torch_llama.py` (`find_peer`)."""
