"""The steps of ``bench/gpu_check.py``: what is run on a GPU, for how long at most, and which figures count."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.step import Step, StepFailed
from bench.record.files import ROOT
from runtime.files.documents import parse_json, read_json
from runtime.start.devices import find_driver
from runtime.start.toolkit import find_toolkits

PYTHON = sys.executable
CUDA = {"GORGON_DEVICE": "cuda"}  # a start that falls back to the CPU is then an error, not a pass
WORK = ROOT / "runs" / "gpu-check"
RESULTS = ROOT / "results" / "gpu"
REQUIREMENTS = ROOT / "requirements-cuda.txt"
SEVEN_B = ROOT / "results" / "engine-7b.json"
# Goals for a pass of the 7b shape, at most: a multiple of reading its bytes, a pass of 64 rows over one of 1, and the
# host's share of a pass.
GOAL_SHAPE = "7b"
FLOOR, VERIFY, HOST = 1.5, 1.25, 0.10
HEADS = ("mlp", "eagle")  # one that drafts all depths at once, one with a decoder layer and a cache of its own
MINUTES = 60.0
WITHOUT_GPU = ("test_emulator.py", "test_nvcc.py")  # of tests/ops: emulation and compilation


def usable_gpu() -> tuple[bool, str]:
    """(whether the driver offers a device, its names or the reason)."""
    driver = find_driver()
    if driver.devices:
        return True, ", ".join(device.name for device in driver.devices)
    return False, driver.trouble or "no device"


def need_wheels() -> str | None:
    """A ``missing`` for the step that installs what a toolkit would contain."""
    if any(not toolkit.problems for toolkit in find_toolkits()):
        return "a complete toolkit is installed: the wheels of requirements-cuda.txt are not needed"
    return None


def need_nvcc() -> str | None:
    """A ``missing`` for steps that only compile."""
    return None if shutil.which("nvcc") else "no nvcc on the PATH"


def sanitizer() -> str | None:
    """The path of compute-sanitizer, None if the toolkit does not contain it."""
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)


def pytest_figures(log: Path) -> dict[str, Any]:
    """Counts in pytest's last line, "3 failed, 10 passed in 4.0s". Raises StepFailed if nothing passed."""
    tail = log.read_text(errors="replace").splitlines()[-5:]
    counts = {word: int(n) for line in tail for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", line)}
    if not counts.get("passed"):
        raise StepFailed("no test passed", counts)
    return counts


def engine_figures(result: Path) -> dict[str, Any]:
    """The figures of ``bench/engine.py``: the worst of its contexts."""
    record = read_json(result)
    (shape,), loop = record["shapes"], record["loop"]
    passes = {(each["context"], each["rows"]): each for each in shape["passes"]}
    contexts = sorted({context for context, _ in passes})
    most = max(rows for _, rows in passes)
    ones = [passes[context, 1] for context in contexts]
    figures = {
        "shape": shape["name"],
        "pass_ms": {str(each["context"]): each["ms"] for each in ones},
        "floor_times": max(1 / each["bandwidth_share"] for each in ones),
        "read_gb_s": shape["bounds"]["read_gb_s"],
        "rows": most,
        "verify_over_one": max(passes[context, most]["ms"] / passes[context, 1]["ms"] for context in contexts),
        "host_share": max((each["share"] for each in shape["host"]), default=None),
        "fits_in_cache": shape["fits_in_cache"],
        "loop_tokens_per_s": loop and loop["autoregressive"]["tokens_per_s"],
        "loop_outside_share": loop and loop["tree"]["outside_ms"] / loop["tree"]["step_ms"],
    }
    if shape["memory"]["late_kernels"]:
        raise StepFailed(f"{shape['memory']['late_kernels']} kernels were compiled on the clock", figures)
    return figures


def engine_line(figures: Mapping[str, Any]) -> str:
    """The figures of ``engine_figures``, those of the goals' shape beside its goals."""
    ms = ", ".join(f"{value:.2f} after {context}" for context, value in figures["pass_ms"].items())
    floor, verify, host = figures["floor_times"], figures["verify_over_one"], figures["host_share"]
    compare = against if figures["shape"] == GOAL_SHAPE else lambda value, goal, text: text.format(value)
    words = [f"pass ms: {ms}", compare(floor, FLOOR, "{:.2f} x the floor")]
    words.append(compare(verify, VERIFY, f"verify({figures['rows']})/verify(1) {{:.2f}}"))
    if host is not None:
        words.append(compare(host, HOST, "host share {:.0%}"))
    if figures["loop_outside_share"] is not None:
        words.append(f"loop: {figures['loop_tokens_per_s']:.0f} tokens/s without a head")
        words.append(against(figures["loop_outside_share"], HOST, "a tree step's share outside the kernels {:.0%}"))
    return "; ".join(words)


def against(value: float, goal: float, text: str) -> str:
    """A figure beside its goal, which is an upper limit: "1.62 x the floor (goal 1.5: missed)"."""
    limit = f"{goal:.0%}" if "%" in text else f"{goal:g}"
    return f"{text.format(value)} (goal {limit}: {'met' if value <= goal else 'missed'})"


def train_figures(result: Path) -> dict[str, Any]:
    """The figures of ``train.json``: the held-out loss has to fall."""
    record = read_json(result)
    losses = [sum(loss for loss in each["loss"] if loss is not None) for each in record["history"]]
    figures = {
        "device": record["provenance"]["device"],
        "steps": record["steps"],
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "tokens_per_s": record["tokens_per_s"],
    }
    if len(losses) < 2 or not losses[-1] < losses[0]:
        raise StepFailed(f"the held-out loss did not fall: {losses}", figures)
    return figures


def train_line(figures: Mapping[str, Any]) -> str:
    """The figures of ``train_figures``."""
    return (
        f"held-out loss {figures['loss_first']:.3f} to {figures['loss_last']:.3f} in {figures['steps']} steps, "
        f"{figures['tokens_per_s']:.0f} tokens/s"
    )


def decoding_figures(result: Path) -> dict[str, Any]:
    """The figures of ``bench/run.py``: every text has to be the baseline's."""
    record = read_json(result)
    metrics, parity = record["metrics"], record["parity"]
    figures = {
        "device": record["provenance"]["device"],
        "accept_length": metrics["accept_length"],
        "tokens_per_s": metrics["tokens_per_s"],
        "baseline_tokens_per_s": record["baseline"]["tokens_per_s"],
        "speedup": metrics["speedup"],
        "identical": parity["identical"],
        "prompts": parity["prompts"],
    }
    if parity["identical"] < parity["prompts"] or not parity["prompts"]:
        raise StepFailed(f"only {parity['identical']} of {parity['prompts']} texts are those of the baseline", figures)
    return figures


def decoding_line(figures: Mapping[str, Any]) -> str:
    """The figures of ``decoding_figures``."""
    return (
        f"accept length {figures['accept_length']:.2f}, {figures['tokens_per_s']:.0f} tokens/s "
        f"({figures['baseline_tokens_per_s']:.0f} without a head), parity {figures['identical']}/{figures['prompts']}"
    )


def _module(*words: str) -> list[str]:
    return [PYTHON, "-m", *words]


def _script(name: str, *words: str) -> list[str]:
    return [PYTHON, str(ROOT / name), *words]


def _engine(shape: str, out: Path, minutes: float, *more: str) -> Step:
    command = _script("bench/engine.py", "--shape", shape, "--no-transformers", "--out", str(out), *more)
    return Step(
        f"engine-{shape}", command, minutes * MINUTES, env=CUDA, read=engine_figures, line=engine_line, result=out
    )


def _head_steps(name: str) -> list[Step]:
    """Train a head for some steps, then decode with it."""
    run, decoded = WORK / name, RESULTS / f"{name}.json"
    checkpoint = run / "checkpoint" / "config.json"
    options = ["--max-steps", "50", "--score-every", "25", "--features", "online", "--out", str(run), "--overwrite"]
    train = _script("train.py", "--head", name, *options)
    decode = _script("bench/run.py", "--greedy", "--backbone", "assets/tiny-vicuna", "--checkpoint", str(run), "--out",
                     str(decoded))  # fmt: skip

    def not_trained() -> str | None:
        return None if checkpoint.exists() else f"{checkpoint.relative_to(ROOT)} is missing: train-{name} has to pass"

    return [
        Step(f"train-{name}", train, 8 * MINUTES, env=CUDA, read=train_figures, line=train_line,
             result=run / "train.json", clears=[checkpoint]),
        Step(f"decode-{name}", decode, 8 * MINUTES, env=CUDA, read=decoding_figures, line=decoding_line,
             result=decoded, missing=not_trained),
    ]  # fmt: skip


def _kernel_steps() -> list[Step]:
    """A step for each file of tests/ops: an illegal access ends the process, and with separate ones no other tests."""
    files = [path for path in sorted((ROOT / "tests" / "ops").rglob("test_*.py")) if path.name not in WITHOUT_GPU]
    command = _module("pytest", "-m", "not slow and not nvcc")
    return [
        Step(
            f"ops-{path.stem.removeprefix('test_')}", [*command, str(path)], 15 * MINUTES, env=CUDA, read=pytest_figures
        )
        for path in files
    ]


CORE = """
import time
start = time.time()
import runtime
from runtime import jt
from runtime.files.documents import to_json
jt.matmul(jt.ones((64, 64)), jt.ones((64, 64))).sync(True)
print(to_json({"device": runtime.device, "seconds": time.time() - start, "provenance": runtime.provenance()}))
"""


def core_figures(log: Path) -> dict[str, Any]:
    """The last line of ``CORE``."""
    return {"device": parse_json(log.read_text(errors="replace").splitlines()[-1], log)["device"]}


MEMCHECK = ["tests/ops/test_select.py", "-k", "test_argmax_is_the_first_of_the_largest"]

STEPS: tuple[Step, ...] = (
    Step(
        "setup", _module("pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)),
        10 * MINUTES, missing=need_wheels,
    ),
    Step("doctor", _module("runtime.doctor"), 2 * MINUTES, needs_gpu=False),
    Step("core", [PYTHON, "-c", CORE], 10 * MINUTES, env=CUDA, read=core_figures),
    Step("gpu-tests", _module("pytest", "-m", "gpu", "tests/gpu"), 20 * MINUTES, env=CUDA, read=pytest_figures),
    *_kernel_steps(),
    _engine("tiny-vicuna", RESULTS / "engine-tiny-vicuna.json", 8),
    _engine("110m", RESULTS / "engine-110m.json", 8, "--no-loop"),
    _engine("7b", SEVEN_B, 10, "--no-loop"),
    *(step for name in HEADS for step in _head_steps(name)),
    Step(
        "memcheck",
        [sanitizer() or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--target-processes",
         "application-only", *_module("pytest", *MEMCHECK)],
        8 * MINUTES, env=CUDA, read=pytest_figures, missing=lambda: None if sanitizer() else "no compute-sanitizer",
    ),
    Step(
        "bodies", _module("pytest", "-m", "nvcc", "tests/ops", "tests/runtime"), 20 * MINUTES, needs_gpu=False,
        env={"GORGON_DEVICE": "cpu"}, read=pytest_figures, missing=need_nvcc,
    ),
)  # fmt: skip
