"""Short trainings on the small backbone, for tests and for the programs that tests start."""

from pathlib import Path

import numpy as np

import runtime
from heads.registry import build
from trainer.config import TrainConfig
from trainer.data.tokens import TokenizedData
from trainer.features.cache import OnlineFeatures
from trainer.fit import Run, fit

NUM_STEPS = 12
OPTIONS = {
    "head": "gated_rnn",
    "head_options": {"num_depths": 2, "inner_size": 24},
    "max_steps": NUM_STEPS,
    "tokens_per_step": 160,
    "score_every": 5,
    "save_every": 4,
    "learning_rate": 2e-2,
    "epochs": 9.0,
}


def counting_data(count: int, seed: int) -> TokenizedData:
    """Conversations that count on from a random number: after a token comes the next one. Nothing is easier."""
    random = np.random.default_rng(seed)
    lengths = random.integers(12, 20, count)
    talks = [((random.integers(3, 64) + np.arange(n)) % 61 + 3, np.arange(n) > 1) for n in lengths]
    return TokenizedData.of(talks)


def training_data() -> tuple[TokenizedData, TokenizedData]:
    """(training, held out)."""
    return counting_data(40, 0), counting_data(8, 1)


def start(backbone, directory: Path, data=None, source=None, progress=None, state=None, on_score=None, **options):
    """One training, or the rest of one; returns (result, head, the records of its steps, the run)."""
    config = TrainConfig(**{**OPTIONS, **options})
    config.check()
    runtime.set_seed(config.seed)
    head = build(config.head, config.head_options, backbone)
    base = {
        "head": config.head,
        "head_config": vars(head.config),
        "backbone": {"fingerprint": backbone.fingerprint, "path": None},
    }
    directory.mkdir(exist_ok=True)
    training, held_out = data or training_data()
    records = []

    def watched(step, num_steps, record):
        records.append(record)
        if progress:
            progress(step, num_steps, record)

    run = Run(config, head, base, directory, **({"on_score": on_score} if on_score else {}))
    sources = source or OnlineFeatures(backbone, training, ()), OnlineFeatures(backbone, held_out, ())
    result = fit(run, training, held_out, *sources, watched, state=state)
    return result, head, records, run
