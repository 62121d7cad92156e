"""Train one draft head on a frozen backbone.

python train.py --head gated_rnn
python train.py --head mlp --data FILE... --backbone DIR --out DIR --epochs 2 --head.num_layers 2
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from heads.registry import available, head_class, summary
from runtime.entry import run_entry
from trainer.config import EMBEDDED_CORPUS, TrainConfig, parse


def list_heads() -> None:
    """One line per head: its name, how it drafts, and what it says of itself, or why it cannot be used."""
    for name in available():
        try:
            head = head_class(name)
        except ValueError as error:
            print(f"{name:16} {'broken':11} {' '.join(str(error).split())}")
            continue
        kind = "parallel" if head.parallel else "sequential"
        print(f"{name:16} {kind:11} {summary(name)}{'' if head.trained else ' (nothing to train)'}")


def prepare_out(config: TrainConfig) -> Path:
    """The run's directory, made and known to be writable. Raises ValueError when it already holds a checkpoint."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    out = Path(config.out or Path("runs") / config.head / stamp)
    if (out / "checkpoint").exists() and not config.overwrite:
        raise ValueError(f"{out} already holds a checkpoint; choose another --out or pass --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "w"):  # every run begins its own log
        pass
    return out


def main(arguments) -> int:
    """The command line. Returns 0, or 130 when Ctrl-C ended the run early (its best checkpoint is kept)."""
    config = parse(arguments)
    if config is None:
        list_heads()
        return 0
    from trainer.data import encode_conversations, hold_out, load_conversations
    from trainer.watch import Watch, card

    files = config.data or [str(EMBEDDED_CORPUS)]
    conversations, report = load_conversations(files)

    import runtime
    from backbone.model import load_backbone
    from backbone.tokenizer import load_tokenizer
    from heads.registry import build
    from trainer.features import OnlineFeatures, open_cache
    from trainer.fit import Run, count_steps, fit

    backbone = load_backbone(config.backbone, config.dtype, config.load_in_8bit)
    tokenizer = load_tokenizer(config.backbone, config.template)
    tokenizer.check_fits(backbone.config)
    max_length = min(config.max_length, backbone.config.max_positions)
    data = encode_conversations(conversations, tokenizer, max_length, report)
    training, held_out = hold_out(data, config.held_out)
    runtime.set_seed(config.seed)
    head = build(config.head, config.head_options, backbone)
    out = prepare_out(config)
    replies = training.token_ids[training.mask]
    head.prepare(np.bincount(replies, minlength=backbone.config.vocab_size))
    layers = tuple(head.layers)
    base = {
        "head": config.head,
        "head_config": vars(head.config),
        "backbone": {
            "fingerprint": backbone.fingerprint,
            "path": config.backbone,
            "hidden_size": backbone.config.hidden_size,
            "vocab_size": backbone.config.vocab_size,
            "dtype": config.dtype,
            "storage": backbone.storage,
        },
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "template": config.template},
        "num_parameters": head.num_parameters,
        "data": {
            "files": [Path(f).name for f in files],
            "sha256": hashlib.sha256(data.token_ids.tobytes() + data.mask.tobytes()).hexdigest(),
            "conversations": len(training),
            "held_out": len(held_out),
            "tokens": int(training.offsets[-1]),
        },
    }
    num_steps = count_steps(config, training, head)
    card(config, backbone, head, report, num_steps, out)
    with Watch(num_steps) as watch:
        if config.features == "cache" and head.trained:
            cached = [
                open_cache(backbone, tokenizer.fingerprint, part, layers, Path(config.cache_dir), *watch.cache(part))
                for part in (training, held_out)
            ]
        else:
            cached = [OnlineFeatures(backbone, part, layers) for part in (training, held_out)]
        result = fit(Run(config, head, base, out), training, held_out, *cached, watch.step)
    status = "interrupted; best kept" if result.interrupted else "done"
    print(
        json.dumps(
            {
                "status": status,
                "checkpoint": str(out / "checkpoint"),
                "expected_accept_length": round(result.best.expected_accept_length, 4),
                "tree_nodes": config.tree_nodes,
                "best_step": result.best_step,
                "steps": result.steps,
                "tokens": result.tokens,
                "train_s": round(result.train_s, 1),
            }
        )
    )
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
