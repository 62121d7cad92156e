"""Other engines on the same clock. None of them is needed to run anything else."""
