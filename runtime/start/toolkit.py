"""Finds CUDA on a machine: compilers, headers and libraries of toolkits and of the ``nvidia-*`` wheels.

Jittor wants everything in one folder. On most machines the compiler and cuBLAS are in different places, and the wheels'
libraries do not have the names that a linker looks for. ``runtime.start.toolkit_folder`` assembles what is found here.
Required are nvcc, the CUDA runtime, cuBLAS and cuRAND, but not cuDNN. The search takes about 0.2 s a compiler.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST, NEWEST = 11, 13  # major versions of CUDA that the patched sources support
NAMED = "GORGON_NVCC"  # the user's nvcc; in child processes nvcc_path names the wrapper script
WHEELS = "pip install -r requirements-cuda.txt"
WHEELS_FIT = 13  # major version of these wheels


@dataclass(frozen=True)
class Wanted:
    """A library: its name for the linker, a header that ships with it, and the header's macro with its version.

    divisor: turns the macro's number into a major version. cuRAND's major version is 10 from CUDA 11 to 13.
    """

    name: str
    title: str
    header: str
    version_header: str
    macro: str
    divisor: int = 1
    own_major: int | None = None

    def major(self, cuda_major: int) -> int:
        """The major version that fits a CUDA version."""
        return self.own_major or cuda_major


LIBRARIES = (
    Wanted("cudart", "the CUDA runtime", "cuda_runtime.h", "cuda_runtime_api.h", "CUDART_VERSION", 1000),
    Wanted("cublas", "cuBLAS", "cublas_v2.h", "cublas_api.h", "CUBLAS_VER_MAJOR"),
    Wanted("cublasLt", "cuBLASLt", "cublasLt.h", "cublas_api.h", "CUBLAS_VER_MAJOR"),
    Wanted("curand", "cuRAND", "curand.h", "curand.h", "CURAND_VER_MAJOR", own_major=10),
)
SYSTEM = Path("/usr")  # where the packages of a distribution install CUDA
CUB_HEADER = "cub/cub.cuh"
RUNTIME_ARCHIVE = "libcudadevrt.a"  # nvcc passes it to every link
# Folders of the wheels of CUDA 11 and 12, each with include and lib; the wheels of CUDA 13 share nvidia/cu13.
OLD_WHEELS = ("cuda_runtime", "cublas", "curand", "cuda_nvcc", "cuda_cccl", "cuda_crt")


@dataclass(frozen=True)
class Part:
    """Where a library was found. header: the folder of its headers. library: the file."""

    header: Path
    library: Path
    major: int


@dataclass(frozen=True)
class Toolkit:
    """A compiler and the libraries that fit it.

    version: (major, minor) of nvcc. top: the folder of its toolkit. codes: compute capabilities that it compiles for,
    empty where it does not list them. parts: by library name, those that fit. cccl: the folder that holds cub, None
    where nvcc finds its own. archive: RUNTIME_ARCHIVE. problems: one sentence for each missing or unfitting part.
    """

    nvcc: Path
    version: tuple[int, int]
    top: Path
    codes: tuple[int, ...]
    parts: dict[str, Part]
    cccl: Path | None
    archive: Path | None
    problems: tuple[str, ...]


def _answer(nvcc: Path | str, *words: str) -> str:
    """The output of nvcc on both streams; empty where it fails."""
    try:
        done = subprocess.run([str(nvcc), *words], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout + done.stderr


def nvcc_version(nvcc: Path | str) -> tuple[int, int] | None:
    """(major, minor) of the toolkit of ``nvcc``, or None where it does not run."""
    match = re.search(r"release (\d+)\.(\d+)", _answer(nvcc, "--version"))
    return (int(match.group(1)), int(match.group(2))) if match else None


def wheel_folders() -> list[Path]:
    """Folders ``nvidia`` of the installed wheels."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []


def _system_folders() -> list[Path]:
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    local = Path("/usr/local")
    versions = sorted(local.glob("cuda-*"), key=lambda path: [int(word) for word in re.findall(r"\d+", path.name)])
    return [folder for folder in [*named, local / "cuda", *reversed(versions)] if folder.is_dir()]


def compilers(wheels: Iterable[Path]) -> Iterator[Path]:
    """Every nvcc in order of preference: named by the user, PATH, toolkits, wheels."""
    named = os.environ.get(NAMED) or os.environ.get("nvcc_path")
    if named:
        yield Path(named)
        return
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    folders = [*_system_folders(), *(cuda for wheel in wheels for cuda in sorted(wheel.glob("cu[0-9]*"), reverse=True))]
    for folder in folders:
        if (folder / "bin" / "nvcc").is_file():
            yield folder / "bin" / "nvcc"


def _top(nvcc: Path) -> Path:
    """The toolkit's folder, as nvcc reports it: it may be a script that starts another one."""
    match = re.search(r"^#\$ TOP=(.+)$", _answer(nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"), re.MULTILINE)
    return Path(match.group(1)).resolve() if match else nvcc.resolve().parent.parent


def _search(top: Path, wheels: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Folders of headers and of libraries that exist, the compiler's own first."""
    machine = platform.machine()
    roots = [top, *_system_folders(), SYSTEM]
    for wheel in wheels:
        roots += [*sorted(wheel.glob("cu[0-9]*"), reverse=True), *(wheel / name for name in OLD_WHEELS)]
    targets = [f"targets/{machine}-linux", "targets/sbsa-linux"]
    headers = [root / below / "include" for root in roots for below in ("", *targets)]
    libraries = [root / below for root in roots for below in ("lib64", "lib", f"lib/{machine}-linux-gnu")]
    libraries += [root / target / "lib" for root in roots for target in targets]
    return tuple(list(dict.fromkeys(path for path in paths if path.is_dir())) for paths in (headers, libraries))


def _header_major(folder: Path, wanted: Wanted) -> int | None:
    version = folder / wanted.version_header
    if not (folder / wanted.header).is_file() or not version.is_file():
        return None
    match = re.search(rf"#define\s+{wanted.macro}\s+(\d+)", version.read_text(errors="replace"))
    return int(match.group(1)) // wanted.divisor if match else None


def _library_majors(folder: Path, name: str) -> dict[int, Path]:
    """Files ``lib<name>.so.<major>...`` in a folder, and what an unversioned name stands for, by major."""
    found = {}
    for path in sorted(folder.glob(f"lib{name}.so*")):
        match = re.search(r"\.so\.(\d+)", path.resolve().name) if path.is_file() else None
        if match:
            found.setdefault(int(match.group(1)), path)
    return found


def _find_part(wanted: Wanted, version: tuple[int, int], headers: list[Path], libraries: list[Path]) -> Part | str:
    """The part, or a sentence about what is wrong with it."""
    major = wanted.major(version[0])
    header_majors = {folder: found for folder in headers if (found := _header_major(folder, wanted)) is not None}
    header = next((folder for folder, found in header_majors.items() if found == major), None)
    files: dict[int, Path] = {}
    for folder in libraries:
        files = _library_majors(folder, wanted.name) | files
    if header is not None and major in files:
        return Part(header, files[major], major)
    others = [f"{found} in {folder}" for folder, found in header_majors.items() if found != major]
    others += [f"{found} in {path.parent}" for found, path in files.items() if found != major]
    what = f"nvcc is {version[0]}.{version[1]}, but {wanted.title} of version {major}"
    if others:
        return f"{what} was not found ({'; '.join(others)})"
    missing = [wanted.header] * (header is None) + [f"lib{wanted.name}.so.{major}"] * (major not in files)
    return f"{what} is missing ({' and '.join(missing)} not found)"


def examine(nvcc: Path, wheels: Iterable[Path]) -> Toolkit | None:
    """The toolkit of a compiler; None where it does not run."""
    version = nvcc_version(nvcc)
    if version is None:
        return None
    top = _top(nvcc)
    headers, libraries = _search(top, wheels)
    found = {wanted.name: _find_part(wanted, version, headers, libraries) for wanted in LIBRARIES}
    problems = [part for part in found.values() if isinstance(part, str)]
    if not OLDEST <= version[0] <= NEWEST:
        problems.insert(0, f"the CUDA toolkit is {version[0]}.{version[1]}; {OLDEST} to {NEWEST} are supported")
    cubs = [folder for base in headers for folder in (base, base / "cccl") if (folder / CUB_HEADER).is_file()]
    if not cubs:
        problems.append(f"nvcc is {version[0]}.{version[1]}, but its C++ library is missing ({CUB_HEADER} not found)")
    archive = next((folder / RUNTIME_ARCHIVE for folder in libraries if (folder / RUNTIME_ARCHIVE).is_file()), None)
    codes = tuple(sorted(int(word) for word in re.findall(r"\bsm_(\d+)\b", _answer(nvcc, "--list-gpu-code"))))
    parts = {name: part for name, part in found.items() if isinstance(part, Part)}
    return Toolkit(nvcc, version, top, codes, parts, cubs[0] if cubs else None, archive, tuple(problems))


def find_toolkits(wheels: Iterable[Path] | None = None) -> list[Toolkit]:
    """Every compiler that runs, the preferred one first, each toolkit once. wheels: None for the installed ones."""
    wheels = wheel_folders() if wheels is None else list(wheels)
    found: dict[Path, Toolkit] = {}
    for nvcc in compilers(wheels):
        toolkit = examine(nvcc, wheels)
        if toolkit:
            found.setdefault(toolkit.top, toolkit)
    return list(found.values())


def remedy(toolkit: Toolkit) -> str:
    """The command that installs what a toolkit is missing."""
    major, minor = toolkit.version
    if major == WHEELS_FIT or not OLDEST <= major <= NEWEST:
        return WHEELS
    wheels = " ".join(f"nvidia-{name}-cu{major}" for name in ("cuda-runtime", "cublas", "curand", "cuda-cccl"))
    return f"install the CUDA {major}.{minor} packages of cuBLAS and cuRAND for developers, or pip install {wheels}"
