"""The device follows from what the driver and the toolkits say, and whatever stands in the way is one clear line."""

import subprocess
from pathlib import Path

import pytest

from runtime.start.choice import Choice, DeviceError, choose_device, code_for
from runtime.start.devices import Device, Driver, find_driver
from runtime.start.toolkit import Toolkit

KNOWN = {11: (35, 50, 70, 80, 86), 12: (50, 70, 80, 86, 87, 89, 90), 13: (75, 80, 86, 87, 88, 89, 90, 100, 110, 120)}


def gpu(version=(13, 0), capability=90, count=1):
    return Driver(version, tuple(Device("a GPU", 2**34, capability) for _ in range(count)))


def toolkit(major, minor=0, problems=(), codes=None):
    codes = KNOWN.get(major, ()) if codes is None else codes
    return Toolkit(Path("/usr/bin/nvcc"), (major, minor), Path("/usr"), codes, {}, None, None, tuple(problems))


NO_GPU = Driver(trouble="no NVIDIA driver")
MISSING = "nvcc is 13.0, but cuBLAS of version 13 is missing (cublas_v2.h and libcublas.so.13 not found)"


@pytest.mark.parametrize(
    ("wanted", "driver", "toolkits", "device", "reason"),
    [
        ("auto", NO_GPU, [], "cpu", "no usable CUDA device: no NVIDIA driver"),
        ("auto", gpu((13, 0)), [], "cpu", "no nvcc on the PATH; pip install -r requirements-cuda.txt"),
        ("auto", gpu((12, 4)), [], "cpu", "no nvcc on the PATH; install the CUDA 12 toolkit"),
        ("auto", gpu((12, 4), 80), [toolkit(11, 8)], "cuda", "1 CUDA device(s), toolkit 11.8"),
        ("auto", gpu((12, 4), count=2), [toolkit(12, 4)], "cuda", "2 CUDA device(s), toolkit 12.4"),
        ("cuda", gpu((13, 1)), [toolkit(13)], "cuda", "1 CUDA device(s), toolkit 13.0"),
        ("auto", gpu((13, 0)), [toolkit(13, 1)], "cuda", "toolkit 13.1"),  # within a major version both ways serve
        ("auto", gpu((14, 0)), [toolkit(14, 0, ["it is 14.0"])], "cpu", "is 14.0; install a CUDA toolkit"),
        ("auto", gpu((12, 4)), [toolkit(13)], "cpu", "up to 12.4, but nvcc is 13.0; install a newer driver"),
        ("auto", gpu((12, 4)), [toolkit(13), toolkit(12, 2)], "cuda", "toolkit 12.2"),
        ("auto", gpu(capability=70), [toolkit(13)], "cpu", "capability 7.0, but nvcc 13.0 compiles for 7.5, 8.0"),
        ("auto", gpu(capability=100), [toolkit(12)], "cpu", "; install a newer CUDA toolkit"),
        ("auto", gpu(), [toolkit(13, 0, [MISSING])], "cpu", f"{MISSING}; pip install -r requirements-cuda.txt"),
        ("auto", gpu(), [toolkit(12, 4, ["no cuBLAS"])], "cpu", "no cuBLAS; install the CUDA 12.4 packages"),
        ("cpu", gpu(count=2), [toolkit(13)], "cpu", "requested"),
    ],
)
def test_the_device_follows_from_what_the_machine_has(wanted, driver, toolkits, device, reason):
    choice = choose_device(wanted, driver, lambda: toolkits)
    assert choice.device == device and reason in choice.reason and "\n" not in choice.reason
    assert (choice.toolkit is None) == (device == "cpu")


@pytest.mark.parametrize(
    ("driver", "toolkits"),
    [(NO_GPU, [toolkit(12)]), (gpu(), []), (gpu((12, 0)), [toolkit(13)]), (gpu(), [toolkit(13, 0, [MISSING])])],
)
def test_cuda_that_was_asked_for_and_cannot_be_had_raises_the_same_line(driver, toolkits):
    with pytest.raises(DeviceError, match="GORGON_DEVICE=cuda is not available: ") as raised:
        choose_device("cuda", driver, lambda: toolkits)
    assert str(raised.value).endswith(choose_device("auto", driver, lambda: toolkits).reason)
    with pytest.raises(ValueError, match="GORGON_DEVICE must be auto, cpu or cuda, got"):
        choose_device("gpu", driver, list)


def test_toolkits_are_looked_for_only_where_there_is_a_device():
    choice = choose_device("auto", NO_GPU, lambda: pytest.fail("looked"))
    assert choice == Choice("cpu", "no usable CUDA device: no NVIDIA driver")


def test_devices_of_several_kinds_are_all_compiled_for_where_the_compiler_can():
    driver = Driver((13, 0), (Device("new", 0, 90), Device("old", 0, 70), Device("middle", 0, 80)))
    assert choose_device("auto", driver, lambda: [toolkit(13)]).capabilities == (80, 90)


@pytest.mark.parametrize(
    ("capability", "codes", "code"),
    [
        (90, (80, 86, 90), 90),
        (89, (80, 86, 90), 86),  # the same major version, an earlier minor one
        (89, (80, 86, 87), 86),  # 8.7 is a board whose code runs nowhere else
        (87, (80, 86), None),
        (100, (80, 90), None),
        (75, (80, 90), None),
        (75, (), 75),  # a compiler that does not tell
    ],
)
def test_a_device_gets_the_nearest_code_that_it_runs(capability, codes, code):
    assert code_for(capability, codes) == code


# The driver

STAND_IN = """
static int status = STATUS;
int cuInit(unsigned flags) { return status; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    name[0] = device == 40 ? 'A' : 'B';
    name[1] = 0;
    return 0;
}
int cuDeviceTotalMem_v2(unsigned long *size, int device) { *size = 5ul << 32; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? (device == 40 ? 9 : 8) : attribute == 76 ? (device == 40 ? 0 : 6) : -1;
    return 0;
}
"""


def stand_in(tmp_path, status):
    source, library = tmp_path / "driver.c", tmp_path / f"libcuda-{status}.so"
    source.write_text(STAND_IN)
    words = ["gcc", "-shared", "-fPIC", f"-DSTATUS={status}", "-o", str(library), str(source)]
    subprocess.run(words, check=True)
    return str(library)


def test_the_driver_is_asked_for_its_version_and_its_devices(tmp_path):
    expected = Driver((12, 8), (Device("A", 5 << 32, 90), Device("B", 5 << 32, 86)))
    assert find_driver(stand_in(tmp_path, 0)) == expected
    assert find_driver("libno-such-driver.so.1") == NO_GPU


@pytest.mark.parametrize(
    ("status", "words"), [(100, "sees no device"), (803, "different versions"), (77, "CUresult 77")]
)
def test_a_driver_without_a_device_says_why(tmp_path, status, words):
    driver = find_driver(stand_in(tmp_path, status))
    assert driver.devices == () and driver.version == (12, 8) and words in driver.trouble
