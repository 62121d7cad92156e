"""The NVIDIA driver's version and devices, queried through ``libcuda.so.1`` without a toolkit.

Not yet run with a real driver; the tests query a stand-in that is compiled from C.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

LIBRARY = "libcuda.so.1"
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute
# Driver errors that a user can do something about (cuda.h, CUresult).
WORDS = {
    3: "the driver is not initialised",
    34: "a stub library stands in for the driver",
    100: "the driver sees no device",
    101: "CUDA_VISIBLE_DEVICES names a device that does not exist",
    802: "the devices' fabric is not ready (is the fabric manager running?)",
    803: "the driver's library and its kernel module are of different versions",
    804: "the driver is too old for this compatibility library",
    999: "the driver's kernel module does not answer",
}


@dataclass(frozen=True)
class Device:
    """One GPU. capability: major * 10 + minor, so 90 for 9.0."""

    name: str
    memory_bytes: int
    capability: int


@dataclass(frozen=True)
class Driver:
    """version: the newest CUDA that the driver supports, (major, minor), or None without a driver. devices: those
    visible to this process (CUDA_VISIBLE_DEVICES). trouble: why there are none."""

    version: tuple[int, int] | None = None
    devices: tuple[Device, ...] = ()
    trouble: str | None = None


def _device(library: ctypes.CDLL, index: int) -> Device:
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    for status in (
        library.cuDeviceGet(ctypes.byref(handle), index),
        library.cuDeviceGetName(name, len(name), handle),
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle),
        library.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, handle),
        library.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, handle),
    ):
        if status:
            raise OSError(f"the driver cannot describe device {index}: CUresult {status}")
    return Device(name.value.decode(errors="replace"), memory.value, 10 * major.value + minor.value)


def find_driver(library_name: str = LIBRARY) -> Driver:
    """Query the driver; empty without one. An error of the driver is named in ``trouble``."""
    try:
        library = ctypes.CDLL(library_name)
    except OSError:
        return Driver(trouble="no NVIDIA driver")
    number, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(number))
    version = (number.value // 1000, number.value % 1000 // 10)
    status = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return Driver(version, trouble=WORDS.get(status or 100, f"the driver answers CUresult {status}"))
    try:
        return Driver(version, tuple(_device(library, index) for index in range(count.value)))
    except OSError as error:
        return Driver(version, trouble=str(error))
