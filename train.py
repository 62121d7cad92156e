"""Train one draft head on a frozen backbone.

python train.py --head gated_rnn
python train.py --head mlp --data FILE... --backbone DIR --out DIR --epochs 2 --head.num_layers 2
python train.py --head mlp --out DIR --resume
python train.py --head mlp --out DIR --ranks 2
"""

from __future__ import annotations

import sys

from heads.registry import available, head_class, summary
from runtime.entry import INTERRUPTED, run_entry
from runtime.files.documents import to_json
from runtime.ranks import barrier, start_ranks
from runtime.start.bootstrap import under_mpi
from trainer.config import parse


def list_heads() -> None:
    """Print one line per head: its name, how it drafts, and its summary, or why it cannot be used."""
    for name in available():
        try:
            head = head_class(name)
        except ValueError as error:
            print(f"{name:16} {'broken':11} {' '.join(str(error).split())}")
            continue
        kind = "parallel" if head.parallel else "sequential"
        print(f"{name:16} {kind:11} {summary(name)}{'' if head.trained else ' (nothing to train)'}")


def main(arguments) -> int:
    """The command line. Returns 0, or 130 when Ctrl-C ended the run early (its best checkpoint is saved)."""
    config = parse(arguments)
    if config is None:
        list_heads()
        return 0
    if config.ranks > 1 and not under_mpi():
        return start_ranks(config.ranks)
    from trainer.data.splits import load_splits

    splits = load_splits(config)  # mistakes in the text are reported before Jittor compiles anything

    import runtime
    from trainer.dry_run.run import dry_run
    from trainer.session import CHECKPOINT, prepare, train

    setting = prepare(config, splits)
    if config.dry_run:
        return dry_run(setting)
    result, out = train(config, setting=setting)
    summary_line = {
        "status": "interrupted; best checkpoint saved, --resume continues" if result.interrupted else "done",
        "checkpoint": str(out / CHECKPOINT),
        "expected_accept_length": round(result.best.expected_accept_length, 4),
        "tree_nodes": config.tree_nodes,
        "best_step": result.best_step,
        "steps": result.steps,
        "tokens": result.tokens,
        "skipped": result.skipped,
        "train_s": round(result.train_s, 1),
    }
    if runtime.is_main():
        print(to_json(summary_line))
    if result.interrupted:
        barrier()  # the first rank that leaves with a status ends the others
    return INTERRUPTED if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
