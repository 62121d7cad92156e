"""A short training with the bodies for the CPU, in a process of its own: what another device's losses are held against.

GORGON_DEVICE=cpu python -m tests.gpu.cpu_training mlp 20 DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.small import small_backbone
from tests.trainer.runs import start

# Small, and enough to fall: conversations that count on.
OPTIONS = {
    "mlp": {"head_options": {"num_depths": 2}, "learning_rate": 1e-2},
    "gated_rnn": {"head_options": {"num_depths": 2, "inner_size": 24}, "learning_rate": 2e-2},
    "eagle": {"head_options": {"num_depths": 2}, "learning_rate": 1e-2},
}


def train(backbone, head: str, num_steps: int, directory: Path):
    """(head, the losses of each step by depth), by the trainer's own loop; a checkpoint is left in ``directory``."""
    settings = {"max_steps": num_steps, "score_every": num_steps, "save_every": num_steps, **OPTIONS[head]}
    _, trained, records, _ = start(backbone, directory, head=head, **settings)
    return trained, [record["loss"] for record in records]


def main() -> None:
    """Print the losses as JSON."""
    head, num_steps, directory = sys.argv[1:]
    _, losses = train(small_backbone("float16"), head, int(num_steps), Path(directory))
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
