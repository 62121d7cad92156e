"""The long run: ``make fuzz MINUTES=60``, or INPUTS=10000, and JSON=FILE for the figures.

Every kind of file is tried in batches, each in a process of its own with a limit of memory and a seed of its own, until
the inputs or the minutes are used up. An input that shows a fault stays in a folder, and the status is then 1.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from runtime.files.documents import parse_json, to_json, write_json
from tests.fuzz.judge import MOST_BYTES, MOST_S, Fault, judge
from tests.fuzz.kinds import KINDS, ROOT

BATCH = 250


def examine(kind, inputs, seed_value, place, read=None, seconds=MOST_S):
    """The figures of ``inputs`` inputs of a kind. Raises Fault; the input is then in ``place``."""
    figures = {"accepted": 0, "refused": 0, "peak_bytes": 0, "worst_s": 0.0}
    read = read or KINDS[kind].read

    @seed(seed_value)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,  # an input may have megabytes; it is in ``place``
    )
    @given(KINDS[kind].contents)
    def run(contents):
        shutil.rmtree(place, ignore_errors=True)
        for name, content in contents.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        accepted, taken, growth = judge(read, place, seconds)
        figures["peak_bytes"] = max(figures["peak_bytes"], growth)
        figures["accepted" if accepted else "refused"] += 1
        figures["worst_s"] = max(figures["worst_s"], taken)

    run()
    return figures


def child(kind, inputs, seed_value, place):
    """One batch, its figures as the last line of stdout."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))
    try:
        print(to_json(examine(kind, inputs, seed_value, place)))
    except Fault as error:
        print(to_json({"fault": str(error)}))
    return 0


def batch(kind, inputs, seed_value, faults):
    """A batch in a process. faults: the folder that keeps an input with a fault."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "input"
        words = [sys.executable, "-m", "tests.fuzz.campaign", "--batch", kind, str(inputs), str(seed_value), str(place)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        if lines and not done.returncode:
            found = parse_json(lines[-1], kind)
        else:
            found = {"fault": f"status {done.returncode}: {done.stderr[-500:]}"}
        if "fault" in found:
            kept = faults / f"{kind.replace(' ', '-')}-{seed_value}"
            shutil.copytree(place, kept, dirs_exist_ok=True)
            found |= {"kind": kind, "seed": seed_value, "input": str(kept)}
        return found


def main(arguments):
    """The command line. Returns the exit status."""
    if arguments[:1] == ["--batch"]:
        kind, inputs, seed_value, place = arguments[1:]
        return child(kind, int(inputs), int(seed_value), Path(place))
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign", description="Try hostile files on readers.")
    parser.add_argument("--inputs", type=int, help="over all kinds (default: 10000, or as many as fit into --minutes)")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--faults", default="runs/fuzz", metavar="FOLDER", help="keeps inputs that show a fault")
    given = parser.parse_args(arguments)
    wanted = given.inputs or (None if given.minutes else 10_000)
    began, total, number = time.monotonic(), 0, 0
    table = {kind: {"inputs": 0, "accepted": 0, "refused": 0, "peak_bytes": 0, "worst_s": 0.0} for kind in given.only}
    faults = []

    def over():
        late = given.minutes is not None and time.monotonic() - began > 60 * given.minutes
        return late or (wanted is not None and total >= wanted)

    while not over():
        for kind in given.only:
            if over():
                break
            count = BATCH if wanted is None else min(BATCH, wanted - total, -(-wanted // len(given.only)))
            found = batch(kind, count, given.seed + number, Path(given.faults))
            total, number = total + count, number + 1
            if "fault" in found:
                faults.append(found)
                print(f"{kind}: {found['fault']}; the input is in {found['input']}", file=sys.stderr, flush=True)
                continue
            row = table[kind]
            for name in ("accepted", "refused"):
                row[name] += found[name]
                row["inputs"] += found[name]
            for name in ("peak_bytes", "worst_s"):
                row[name] = max(row[name], found[name])
    seconds = time.monotonic() - began
    print(f"{'kind':<16}{'inputs':>8}{'accepted':>10}{'refused':>9}{'peak MB':>9}{'worst s':>9}")
    for kind, row in table.items():
        counts = f"{row['inputs']:>8}{row['accepted']:>10}{row['refused']:>9}"
        print(f"{kind:<16}{counts}{row['peak_bytes'] / 1e6:>9.0f}{row['worst_s']:>9.2f}")
    print(f"{sum(row['inputs'] for row in table.values())} inputs in {seconds:.0f} s, {len(faults)} faults")
    if given.json:
        write_json(given.json, {"seed": given.seed, "seconds": seconds, "kinds": table, "faults": faults})
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
