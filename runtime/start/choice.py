"""Which device this process runs on, and why: a decision table over the driver and the toolkits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from runtime.start.devices import Driver
from runtime.start.toolkit import NEWEST, OLDEST, WHEELS, WHEELS_FIT, Toolkit, remedy

WORDS = ("auto", "cpu", "cuda")
# Capabilities of embedded boards: code for them runs nowhere else, and they take no other code.
BOARDS = frozenset({53, 62, 72, 87, 88, 101, 110})


class DeviceError(ValueError):
    """The requested device cannot be used here."""


@dataclass(frozen=True)
class Choice:
    """device: ``cpu`` or ``cuda``. because: one sentence. step: how to get what is missing. For cuda, the toolkit and
    the compute capabilities (90 for 9.0) to compile for."""

    device: str
    because: str
    step: str = ""
    toolkit: Toolkit | None = None
    capabilities: tuple[int, ...] = ()

    @property
    def reason(self) -> str:
        """The sentence and the step, on one line."""
        return f"{self.because}; {self.step}" if self.step else self.because


def code_for(capability: int, codes: Iterable[int]) -> int | None:
    """The capability to compile for so that a device of ``capability`` runs it, None where the compiler has none.

    Code for 8.6 runs on 8.9, code of another major version does not: ``code_for(89, (80, 86, 90)) == 86``. A compiler
    that does not list its codes is assumed to know the capability.
    """
    codes = list(codes)
    if not codes:
        return capability
    if capability in codes:
        return capability
    lower = {code for code in codes if code // 10 == capability // 10 and code < capability}
    return None if capability in BOARDS else max(lower - BOARDS, default=None)


def misfit(driver: Driver, toolkit: Toolkit) -> tuple[str, str] | None:
    """Why a toolkit does not fit the driver's first device, and the next step; None where it fits.

    Within a major version an older driver runs a newer toolkit's code, since all code is compiled for the device.
    """
    major, minor = toolkit.version
    newest = ".".join(map(str, driver.version))
    if not OLDEST <= major <= NEWEST:
        return toolkit.problems[0], f"install a CUDA toolkit from {OLDEST} to {NEWEST}"
    if driver.version[0] < major:
        return (
            f"the driver supports CUDA up to {newest}, but nvcc is {major}.{minor}",
            f"install a newer driver, or a CUDA {driver.version[0]} toolkit and name its nvcc in nvcc_path",
        )
    first = driver.devices[0]
    if code_for(first.capability, toolkit.codes) is None:
        capability = f"{first.capability // 10}.{first.capability % 10}"
        known = ", ".join(f"{code // 10}.{code % 10}" for code in toolkit.codes)
        what = f"{first.name} has compute capability {capability}, but nvcc {major}.{minor} compiles for {known}"
        return what, f"install {'an older' if first.capability < min(toolkit.codes) else 'a newer'} CUDA toolkit"
    return (toolkit.problems[0], remedy(toolkit)) if toolkit.problems else None


def _from_toolkits(driver: Driver, toolkits: list[Toolkit]) -> Choice:
    """The first toolkit that fits; without one the CPU, with what the first one is missing."""
    if not toolkits:
        major = driver.version[0]
        step = WHEELS if major >= WHEELS_FIT else f"install the CUDA {major} toolkit"
        return Choice("cpu", "a CUDA device but no nvcc on the PATH", step)
    troubles = []
    for toolkit in toolkits:
        trouble = misfit(driver, toolkit)
        if trouble is None:
            codes = {code_for(device.capability, toolkit.codes) for device in driver.devices} - {None}
            because = f"{len(driver.devices)} CUDA device(s), toolkit {'.'.join(map(str, toolkit.version))}"
            return Choice("cuda", because, "", toolkit, tuple(sorted(codes)))
        troubles.append(trouble)
    return Choice("cpu", *troubles[0])


def choose_device(wanted: str, driver: Driver, look: Callable[[], list[Toolkit]]) -> Choice:
    """The device to run on.

    wanted: ``auto``, ``cpu`` or ``cuda``. look: returns the toolkits, the preferred one first; called only when there
    is a device. Raises DeviceError when ``cuda`` is requested and unavailable, and ValueError for another word.
    """
    if wanted not in WORDS:
        raise ValueError(f"GORGON_DEVICE must be auto, cpu or cuda, got {wanted!r}")
    if wanted == "cpu":
        return Choice("cpu", "requested")
    if driver.devices:
        choice = _from_toolkits(driver, look())
    else:
        choice = Choice("cpu", f"no usable CUDA device: {driver.trouble}")
    if wanted == "cuda" and choice.device != "cuda":
        raise DeviceError(f"GORGON_DEVICE=cuda is not available: {choice.reason}")
    return choice
