"""What each rank of an ``mpirun`` in test_ranks.py runs: a training of its own, and a report of what it saw.

python tests/trainer/ranks_program.py OUT '{"head": "mlp", ...}' [fail|die|hang]
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from runtime.entry import run_entry


def main(arguments):
    import runtime
    from runtime.ranks import share_from_main
    from tests.small import small_backbone
    from tests.trainer.runs import start, training_data
    from trainer.features.cache import OnlineFeatures

    out, options, trouble = Path(arguments[0]), json.loads(arguments[1]), arguments[2] if len(arguments) > 2 else ""
    backbone, data, seen = small_backbone(), training_data(), []
    rank = runtime.rank()
    unequal = runtime.jt.array(np.full(3, rank, np.float32))
    share_from_main([unequal])
    assert (unequal.numpy() == 0).all()
    online = OnlineFeatures(backbone, data[0], ())

    def source(indices):
        seen.extend(int(i) for i in indices)
        return online(indices)

    def progress(step, num_steps, record):
        if rank == 1 and step == 3:
            if trouble == "fail":
                raise ValueError("rank 1 has had enough")
            if trouble == "bug":
                raise RuntimeError("an error that nobody expected")
            if trouble == "die":
                os.kill(os.getpid(), signal.SIGKILL)

    result, head, records, _ = start(backbone, out, source=source, progress=progress, **options)
    arrays = {name: p.numpy() for name, p in head.named_parameters()}
    np.savez(out / f"rank{rank}.npz", **arrays)
    report = {"seen": seen, "loss": [r["loss"] for r in records], "top1": [r["top1"] for r in records]}
    report |= {"score": result.best.expected_accept_length, "top5": result.best.top5, "world": runtime.world_size()}
    (out / f"rank{rank}.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
