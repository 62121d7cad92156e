"""How Jittor starts: the machine, the device a run takes, the sources that are compiled. Door: `bootstrap.py`."""
