"""The command that writes or verifies a feature cache ahead of the runs that share it.

    python -m trainer.features --data FILE... --heads NAME...

writes the cache for all layers that these heads need (default: every head); with --verify it checks an existing cache.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from heads.registry import available, build, head_class
from runtime.entry import Parser
from runtime.files.documents import to_json
from runtime.options import add_options, option_fields, read_options
from trainer.config import TextOptions, TrainConfig
from trainer.data.splits import load_splits
from trainer.features.cache import array_names, feature_store, open_cache
from trainer.report.watch import Watch


def layers_of(names: Sequence[str] | None, backbone) -> tuple[int, ...]:
    """The layers that any of these heads needs with its default options; None: every head that can be built and
    trained. Raises ValueError for a name that cannot be used."""
    layers = set()
    for name in available() if names is None else names:
        try:
            if head_class(name).trained:
                layers.update(build(name, {}, backbone).layers)
        except ValueError as error:
            if names is not None:
                raise
            print(f"skipped {name}: {' '.join(str(error).split())}", file=sys.stderr)
    return tuple(sorted(layers))


def main(arguments: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    parser = Parser(prog="python -m trainer.features", description="Write or verify the cache of backbone features.")
    add_options(parser, TrainConfig, only=[*option_fields(TextOptions), "cache_dir"])
    parser.add_argument("--heads", nargs="+", metavar="NAME", help="whose layers to write (default: every head's)")
    parser.add_argument("--verify", action="store_true", help="check the existing cache and write nothing")
    given = parser.parse_args(arguments)
    config = read_options(TrainConfig, given)
    config.check_text()
    for name in given.heads or ():
        head_class(name)  # an unknown head is reported before anything is loaded
    splits = load_splits(config)
    backbone = config.load()
    layers, fingerprint, root = layers_of(given.heads, backbone), splits.tokenizer.fingerprint, Path(config.cache_dir)
    names, parts = array_names(layers), []
    with Watch(0) as watch:
        watch.say(splits.report.summary())
        for part, data in (("training", splits.training), ("held out", splits.held_out)):
            started = time.perf_counter()
            store = feature_store(backbone, fingerprint, data, root)
            if given.verify:
                present = store.present(names)
                store.verify(present)
                missing = [store.path(shard) for shard in store.all(names) if shard not in present]
                if missing:
                    raise ValueError(
                        f"{missing[0]} and {len(missing) - 1} other shards are missing, the {len(present)} others are "
                        "intact; run without --verify to write them"
                    )
            else:
                open_cache(backbone, fingerprint, data, layers, root, *watch.cache(data))
            parts.append({
                "part": part,
                "sequences": len(data),
                "tokens": int(data.offsets[-1]),
                "path": str(store.directory),
                "shards": store.num_shards,
                "bytes": store.num_bytes(store.all(names)),
                "seconds": round(time.perf_counter() - started, 2),
            })  # fmt: skip
    print(to_json({"status": "verified" if given.verify else "written", "arrays": names, "parts": parts}))
