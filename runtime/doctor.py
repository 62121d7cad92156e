"""What this machine has for Jittor, which device a run would take and why, and how to install what is missing.

    python -m runtime.doctor                         # inspects only, imports nothing heavy
    python -m runtime.doctor --start                 # also starts Jittor and checks a small product
    python -m runtime.doctor --compile --archs 80 90 # also compiles Jittor's CUDA build; needs nvcc and no GPU
    python -m runtime.doctor --json

Exits with status 0 when the chosen device is usable and with 1 when something it needs is missing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from runtime.compile_check import CAPABILITIES, compile_core
from runtime.entry import Parser, run_entry
from runtime.files.documents import to_json
from runtime.start.choice import DeviceError, choose_device
from runtime.start.devices import Driver, find_driver
from runtime.start.jittor_source import WRITTEN_FOR
from runtime.start.onednn import onednn_prefix
from runtime.start.python_config import places
from runtime.start.toolkit import CUB_HEADER, LIBRARIES, Toolkit, find_toolkits

INSTALL = "pip install -r requirements.txt"


@dataclass(frozen=True)
class Missing:
    """Something that is missing, the command that installs it, and whether the chosen device needs it."""

    what: str
    command: str
    needed: bool


@dataclass
class Findings:
    """The result of an inspection. found: lines by name. checks: results of --start and --compile."""

    device: str | None
    reason: str
    found: dict[str, str | None]
    driver: Driver
    toolkits: list[Toolkit]
    missing: list[Missing]
    checks: dict[str, dict] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether a run can start."""
        return not any(missing.needed for missing in self.missing)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(program: str) -> str | None:
    """A program's path and version line; None where it is not on the PATH."""
    path = shutil.which(program)
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    return f"{path}: {(done.stdout or done.stderr).splitlines()[0] if done.stdout or done.stderr else '?'}"


def look_around() -> dict[str, str | None]:
    """What every start needs, by name; None for what is missing."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    config = next((place for place in places() if place.is_file()), None)
    prefix = onednn_prefix()
    return {
        "python": f"{platform.python_version()}, {sys.executable}",
        "Python.h": str(config or header) if config or header.is_file() else None,
        "jittor": _version("jittor") if importlib.util.find_spec("jittor") else None,
        "numpy": _version("numpy"),
        "g++": _first_line(os.environ.get("cc_path") or "g++"),
        "oneDNN": str(prefix / "lib" / "libdnnl.so.2") if prefix else None,
        "mpicc": _first_line("mpicc"),
    }


def what_is_missing(found: dict[str, str | None]) -> list[Missing]:
    """What is missing for a start, CUDA aside."""
    header = f"apt-get install python3.{sys.version_info.minor}-dev"
    needs = {"Python.h": header, "jittor": INSTALL, "numpy": INSTALL, "g++": "apt-get install g++"}
    missing = [Missing(name, command, True) for name, command in needs.items() if found[name] is None]
    if found["jittor"] not in (None, WRITTEN_FOR):
        what = f"Jittor {WRITTEN_FOR}, the supported version (found {found['jittor']})"
        missing.append(Missing(what, f"pip install jittor=={WRITTEN_FOR}", False))
    if found["numpy"] and int(found["numpy"].split(".")[0]) >= 2:
        missing.append(Missing(f"numpy below 2, which Jittor needs (found {found['numpy']})", INSTALL, True))
    if found["oneDNN"] is None:
        missing.append(Missing("oneDNN: training on the CPU runs at a tenth of its speed", INSTALL, False))
    if found["mpicc"] is None:
        missing.append(Missing("Open MPI, for several processes", "apt-get install openmpi-bin libopenmpi-dev", False))
    return missing


def examine_machine() -> Findings:
    """Inspect everything without importing Jittor. Raises ValueError for an unknown GORGON_DEVICE."""
    wanted = os.environ.get("GORGON_DEVICE", "auto")
    found, driver, toolkits = look_around(), find_driver(), find_toolkits()
    missing = what_is_missing(found)
    try:
        choice = choose_device(wanted, driver, lambda: toolkits)
        device, reason = choice.device, choice.reason
    except DeviceError as error:
        choice = choose_device("auto", driver, lambda: toolkits)
        device, reason = None, str(error)
    if device is None or choice.step:
        missing.append(Missing(choice.because, choice.step or "GORGON_DEVICE=cpu", device is None))
    return Findings(device, reason, found, driver, toolkits, missing)


def _toolkit_lines(toolkit: Toolkit) -> list[str]:
    lines = [f"nvcc      {toolkit.version[0]}.{toolkit.version[1]}, {toolkit.nvcc} (toolkit {toolkit.top})"]
    for wanted in LIBRARIES:
        part = toolkit.parts.get(wanted.name)
        if part:
            lines.append(f"  {wanted.name:9} {part.library}, headers {part.header}")
    if toolkit.cccl:
        lines.append(f"  {'cub':9} {toolkit.cccl / CUB_HEADER}")
    return [*lines, *(f"  missing   {problem}" for problem in toolkit.problems)]


def report(findings: Findings) -> str:
    """The findings as text."""
    lines = [f"{name:9} {value or 'not found'}" for name, value in findings.found.items()]
    driver = findings.driver
    supports = f"supports CUDA up to {driver.version[0]}.{driver.version[1]}" if driver.version else None
    lines.append(f"driver    {', '.join(filter(None, [supports, driver.trouble]))}")
    for index, device in enumerate(driver.devices):
        memory, capability = device.memory_bytes / 2**30, f"{device.capability // 10}.{device.capability % 10}"
        lines.append(f"  GPU {index}     {device.name}, {memory:.1f} GiB, compute capability {capability}")
    for toolkit in findings.toolkits:
        lines += _toolkit_lines(toolkit)
    if not findings.toolkits:
        lines.append("nvcc      not found")
    lines.append(f"device    {findings.device or 'none'} ({findings.reason})")
    for missing in findings.missing:
        lines.append(f"{'missing' if missing.needed else 'optional'}: {missing.what}")
        lines.append(f"  install with: {missing.command}")
    lines += [f"{name}: {to_json(answer)}" for name, answer in findings.checks.items()]
    return "\n".join(lines)


def try_start() -> dict:
    """Start Jittor on the chosen device and check a product against NumPy. Raises ValueError when they differ."""
    import numpy as np

    import runtime

    left = np.arange(12, dtype=np.float32).reshape(3, 4)
    product = (runtime.jt.array(left) @ runtime.jt.array(left.T)).numpy()
    if not np.array_equal(product, left @ left.T):  # small integers: exact in float32, whatever the order
        raise ValueError(f"a 3x4 product on {runtime.device} is {product.tolist()}, not {(left @ left.T).tolist()}")
    return {"device": runtime.device, "product": "equal to NumPy's"}


def main(arguments: Sequence[str]) -> int:
    """Inspect, print and return the exit status."""
    parser = Parser(prog="runtime.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--start", action="store_true", help="start Jittor and check a small product")
    parser.add_argument("--compile", action="store_true", help="compile Jittor's CUDA build; needs nvcc and no GPU")
    parser.add_argument(
        "--archs", type=int, nargs="+", default=list(CAPABILITIES), help="compute capabilities, 90 for 9.0"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    findings = examine_machine()
    checks = {"compile": lambda: compile_core(options.archs)} if options.compile else {}
    if options.start and findings.usable:
        checks["start"] = try_start
    for name, check in checks.items():
        try:
            findings.checks[name] = check()
        except ValueError as error:
            findings.checks[name] = {"failed": str(error)}
    if options.json:
        print(to_json(asdict(findings) | {"usable": findings.usable}))
    else:
        print(report(findings))
    failed = any("failed" in answer for answer in findings.checks.values())
    return 1 if failed or not findings.usable else 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
