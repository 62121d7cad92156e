"""How Jittor starts: what the machine has, which device a run takes, the sources it is built from. Door: `bootstrap.py`."""
