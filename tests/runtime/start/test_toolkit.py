"""The parts of CUDA on a machine are found wherever they are, have to fit together, and become one folder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.atomic import atomic_directory, check_writable, write_file
from runtime.start import toolkit
from runtime.start.toolkit import NAMED, examine, find_toolkits, nvcc_version, remedy
from runtime.start.toolkit_folder import assemble, plan

MACROS = {
    "cuda_runtime_api.h": "#define CUDART_VERSION  {0}0{1}0",
    "cublas_api.h": "#define CUBLAS_VER_MAJOR {0}\n#define CUBLAS_VER_MINOR {1}",
    "curand.h": "#define CURAND_VER_MAJOR 10",
}
EMPTY = ("cuda_runtime.h", "cublas_v2.h", "cublasLt.h", "cub/cub.cuh")


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """Nothing of this machine's own CUDA is found."""
    monkeypatch.setattr(toolkit, "_system_folders", list)
    monkeypatch.setattr(toolkit, "SYSTEM", tmp_path / "no-usr")
    for name in (NAMED, "nvcc_path", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_nvcc(folder, version="13.0", top=None, codes=(80, 90)):
    """A compiler that says what it is and writes down what it is called with."""
    top = top or folder.parent
    listed = " ".join(f"sm_{code}" for code in codes)
    path = write(
        folder / "nvcc",
        "#!/bin/sh\n"
        f'case "$1" in\n  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;\n'
        f"  --dryrun) echo '#$ TOP={top}/bin/..' >&2 ;;\n  --list-gpu-code) echo '{listed}' ;;\n"
        f'  *) for word do echo "<$word>"; done ;;\nesac\n',
    )
    path.chmod(0o755)
    return path


def write_headers(folder, major=13, minor=0, only=("cuda_runtime", "cublas", "curand", "cub")):
    for name in (*MACROS, *EMPTY):
        if name.startswith(tuple(only)):
            write(folder / name, MACROS.get(name, "").format(major, minor))


def write_libraries(folder, names):
    for name in names:
        write(folder / name)


FULL = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcudadevrt.a")


def complete_toolkit(root, version="13.0"):
    major, minor = map(int, version.split("."))
    write_headers(root / "include", major, minor)
    write_libraries(root / "lib64", [name.replace("13", str(major)) for name in FULL])
    return write_nvcc(root / "bin", version)


# Finding


def test_a_toolkit_says_its_version_or_nothing(tmp_path):
    text = "Cuda compilation tools, release 13.1, V13.1.80"
    for name, body in (("a", f"echo '{text}'"), ("b", "echo 'hello'"), ("c", f"echo '{text}'; exit 1")):
        write(tmp_path / name, f"#!/bin/sh\n{body}\n").chmod(0o755)
    assert [nvcc_version(tmp_path / name) for name in ("a", "b", "c", "none")] == [(13, 1), None, None, None]
    assert examine(tmp_path / "b", []) is None


@pytest.mark.parametrize("version", ["11.8", "13.0"])
def test_a_complete_toolkit_has_no_problem(tmp_path, version):
    found = examine(complete_toolkit(tmp_path, version), [])
    major, minor = map(int, version.split("."))
    assert found.problems == () and found.version == (major, minor) and found.codes == (80, 90)
    assert {name: part.major for name, part in found.parts.items()} == {
        "cudart": major, "cublas": major, "cublasLt": major, "curand": 10,
    }  # fmt: skip


def test_a_compiler_that_is_a_script_elsewhere_is_asked_where_its_toolkit_lies(tmp_path):
    complete_toolkit(tmp_path / "cuda")
    found = examine(write_nvcc(tmp_path / "scripts", top=tmp_path / "cuda"), [])
    assert found.top == tmp_path / "cuda" and found.problems == ()


def test_wheels_of_cuda_13_fill_in_what_a_bare_compiler_lacks(tmp_path):
    wheels = tmp_path / "nvidia"
    write_headers(wheels / "cu13" / "include")
    write_libraries(wheels / "cu13" / "lib", FULL)
    found = examine(write_nvcc(tmp_path / "cuda" / "bin"), [wheels])
    assert found.problems == () and found.parts["cublas"].library == wheels / "cu13" / "lib" / "libcublas.so.13"


def test_wheels_of_cuda_12_lie_in_a_folder_each(tmp_path):
    wheels = tmp_path / "nvidia"
    for folder, header, libraries in (
        ("cuda_runtime", "cuda_runtime", ["libcudart.so.12", "libcudadevrt.a"]),
        ("cublas", "cublas", ["libcublas.so.12", "libcublasLt.so.12"]),
        ("curand", "curand", ["libcurand.so.10"]),
        ("cuda_cccl", "cub/", []),
    ):
        write_headers(wheels / folder / "include", 12, 4, (header,))
        write_libraries(wheels / folder / "lib", libraries)
    found = examine(write_nvcc(tmp_path / "cuda" / "bin", "12.4"), [wheels])
    assert found.problems == () and found.parts["curand"].header == wheels / "curand" / "include"


def test_libraries_of_another_major_version_are_refused_with_one_line(tmp_path):
    wheels = tmp_path / "nvidia"
    write_headers(wheels / "cublas" / "include", 12, 4, ("cublas",))
    write_libraries(wheels / "cublas" / "lib", ["libcublas.so.12", "libcublasLt.so.12"])
    write_headers(tmp_path / "cuda" / "include", only=("cuda_runtime", "curand", "cub/"))
    write_libraries(tmp_path / "cuda" / "lib64", ["libcudart.so.13", "libcurand.so.10"])
    first, second = examine(write_nvcc(tmp_path / "cuda" / "bin"), [wheels]).problems
    assert first.startswith("nvcc is 13.0, but cuBLAS of version 13 was not found (12 in ") and "\n" not in first
    assert second.startswith("nvcc is 13.0, but cuBLASLt of version 13")


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("lib64/libcurand.so.10", "cuRAND of version 10 is missing (libcurand.so.10 not found)"),
        ("include/cublas_v2.h", "cuBLAS of version 13 is missing (cublas_v2.h not found)"),
        ("include/cub/cub.cuh", "its C++ library is missing (cub/cub.cuh not found)"),
    ],
)
def test_what_is_missing_is_named(tmp_path, gone, words):
    nvcc = complete_toolkit(tmp_path)
    (tmp_path / gone).unlink()
    found = examine(nvcc, [])
    assert len(found.problems) == 1 and words in found.problems[0]
    assert remedy(found) == "pip install -r requirements-cuda.txt"
    assert "is 10.2; 11 to 13 are supported" in examine(complete_toolkit(tmp_path, "10.2"), []).problems[0]


def test_compilers_come_in_order_and_once(tmp_path, monkeypatch):
    named, wheels = tmp_path / "named", tmp_path / "nvidia"
    on_path = complete_toolkit(tmp_path / "cuda")
    complete_toolkit(named)
    complete_toolkit(wheels / "cu13")
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    monkeypatch.setattr(toolkit, "_system_folders", lambda: [tmp_path / "cuda"])
    assert [found.top for found in find_toolkits([wheels])] == [tmp_path / "cuda", wheels / "cu13"]
    monkeypatch.setenv("nvcc_path", str(named / "bin" / "nvcc"))
    assert [found.top for found in find_toolkits([wheels])] == [named]
    monkeypatch.setenv(NAMED, str(on_path))  # the process that started this one has put its script into nvcc_path
    assert [found.top for found in find_toolkits([wheels])] == [tmp_path / "cuda"]


# The folder


def test_the_folder_holds_a_compiler_headers_and_libraries_under_all_their_names(tmp_path):
    complete_toolkit(tmp_path / "cuda")
    wheels = tmp_path / "nvidia"
    write_headers(wheels / "cu13" / "include")
    (tmp_path / "cuda" / "include" / "curand.h").unlink()
    lib = tmp_path / "cuda" / "lib64"
    (lib / "libcublas.so.13").rename(lib / "libcublas.so.13.1.0.3")
    (lib / "libcublas.so.13").symlink_to("libcublas.so.13.1.0.3")
    found = examine(tmp_path / "cuda" / "bin" / "nvcc", [wheels])
    folder = assemble(plan(found, [90]), tmp_path / "cache")
    assert sorted(path.name for path in (folder / "lib64").glob("libcublas.*")) == [
        "libcublas.so", "libcublas.so.13", "libcublas.so.13.1.0.3",
    ]  # fmt: skip
    assert all(path.exists() for path in (folder / "lib64").iterdir())
    assert (folder / "include" / "curand.h").resolve() == wheels / "cu13" / "include" / "curand.h"
    assert (folder / "include" / "cublas_v2.h").resolve() == tmp_path / "cuda" / "include" / "cublas_v2.h"
    assert not (folder / "bin" / "nvcc").is_symlink()


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (
            ["-std=c++14", "x y.cc", "-DA='b'"],
            ["-gencode", "arch=compute_90,code=sm_90", "-std=c++17", "x y.cc", "-DA='b'"],
        ),
        (["-arch=compute_80", "-code=sm_80", "-O2"], ["-arch=compute_80", "-code=sm_80", "-O2"]),
    ],
)
def test_the_compilers_script_passes_words_on(tmp_path, given, passed):
    found = examine(complete_toolkit(tmp_path / "a folder with spaces"), [])
    script = assemble(plan(found, [90]), tmp_path / "cache") / "bin" / "nvcc"
    done = subprocess.run([script, *given], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"<{word}>" for word in passed]


def test_the_folder_is_named_by_its_contents_and_made_once(tmp_path):
    found = examine(complete_toolkit(tmp_path / "cuda"), [])
    entries = plan(found, [90])
    folder = assemble(entries, tmp_path / "cache")
    made = folder.stat().st_ino
    assert assemble(entries, tmp_path / "cache") == folder and folder.stat().st_ino == made
    assert assemble(plan(found, [80]), tmp_path / "cache") != folder
    assert assemble(plan(examine(complete_toolkit(tmp_path / "cuda", "13.1"), []), [90]), tmp_path / "cache") != folder
    assert not list((tmp_path / "cache").glob("*.partial"))


MAKER = """
import sys
from pathlib import Path
from runtime.start.toolkit_folder import Entry, assemble
sys.stdin.read()  # all begin together
print(assemble({f"d{i}/f{j}": Entry(text=str(j)) for i in range(5) for j in range(100)}, Path(sys.argv[1])))
"""


def test_several_processes_make_one_complete_folder(tmp_path):
    root = Path(__file__).resolve().parents[3]
    words = [sys.executable, "-c", MAKER, str(tmp_path)]
    makers = [
        subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for maker in makers:
        maker.stdin.close()
    printed = {maker.stdout.read().strip() for maker in makers}
    assert [maker.wait() for maker in makers] == [0] * 4 and len(printed) == 1
    (folder,) = tmp_path.iterdir()
    assert str(folder) in printed and len(list(folder.glob("d*/f*"))) == 500


def test_a_folder_that_appears_at_the_last_moment_is_replaced_by_its_equal(tmp_path, monkeypatch):
    directory = tmp_path / "folder"
    rename = os.rename

    def late(source, target):
        if not os.path.exists(target):  # another process comes first
            directory.mkdir()
            (directory / "x").write_text("theirs")
        rename(source, target)

    with atomic_directory(directory) as partial:
        (partial / "x").write_text("ours")
        monkeypatch.setattr(os, "rename", late)
    assert (directory / "x").read_text() == "ours" and list(tmp_path.iterdir()) == [directory]


@pytest.mark.parametrize("write", [check_writable, lambda path: write_file(path, "x")])
def test_a_file_that_cannot_be_written_is_named_and_the_reason_kept(tmp_path, write):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, reason in ((tmp_path / "file" / "x", errno.ENOTDIR), (tmp_path / "folder", errno.EISDIR)):
        with pytest.raises(OSError, match=f"^cannot write {path}: ") as caught:
            write(path)
        assert caught.value.errno in (reason, errno.EEXIST) and "\n" not in str(caught.value)
