"""The CUDA text of operations, written out as a file that nvcc can compile without Jittor.

Operations run emulated while what they hand to ``jt.code`` is noted down: the headers, the text, the types and ranks of
inputs and outputs. From that comes a function for each program, with the names that Jittor gives: in0_p, in0_shape0,
in0->num, out0_p, data["name"].
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import ops.kernel
from ops.kernel import emulated_cuda
from runtime import jt

TYPES = {
    "float16": "__half", "float32": "float", "float64": "double", "int8": "int8_t", "uint8": "uint8_t",
    "int16": "int16_t", "uint16": "uint16_t", "int32": "int32_t", "int64": "int64_t", "bool": "bool",
}  # fmt: skip
# As Jittor calls nvcc, but for the standard, which newer headers want higher.
FLAGS = ["-x", "cu", "-std=c++17", "-O3", "--use_fast_math", "-w", "-Xcompiler", "-fPIC", "-Xptxas", "-v"]
PRELUDE = """
#include <cstdint>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>
struct Check {
    bool fine;
    std::ostringstream text;
    ~Check() noexcept(false) { if (!fine) throw std::runtime_error(text.str()); }
    template <class T> Check& operator<<(const T& part) { text << part; return *this; }
};
#define CHECK(condition) Check{bool(condition)}
#define ASSERT(condition) CHECK(condition)
struct Held { int64_t num, size; };
"""


@dataclass(frozen=True)
class Program:
    """headers: the include lines; variables: (name, C++ type, rank) of inputs and outputs; data: names of numbers."""

    headers: str
    text: str
    variables: tuple[tuple[str, str, int], ...]
    data: tuple[str, ...]

    def function(self, number: int) -> str:
        """C++ text of a function that holds the program."""
        lines = []
        for name, kind, rank in self.variables:
            lines.append(f"{kind}* {name}_p = ({kind}*)*pointers++; Held* {name} = (Held*)*pointers++; (void){name};")
            lines += [
                f"int64_t {name}_{what}{axis} = *sizes++; (void){name}_{what}{axis};"
                for axis in range(rank)
                for what in ("shape", "stride")
            ]
        body = "\n    ".join(lines)
        return f"""
void program_{number}(void** pointers, int64_t* sizes, std::map<std::string, double>& data) {{
    {body}
    {{{self.text}}}
}}
"""


def record(calls: list[Callable[[], object]]) -> list[Program]:
    """The distinct programs that the calls launch, in order. They are run, emulated."""
    programs: dict[Program, None] = {}

    def code(shapes, dtypes, inputs, cpu_header="", cpu_src="", data=None, outputs=None):
        made = jt.code(shapes, dtypes, inputs, cpu_header=cpu_header, cpu_src=cpu_src, data=data or {})
        results = made if isinstance(made, (list, tuple)) else [made]
        variables = [
            (f"{role}{i}", TYPES[str(var.dtype)], len(var.shape))
            for role, several in (("in", inputs), ("out", results))
            for i, var in enumerate(several)
        ]
        assert "emulator.h" in cpu_header, cpu_header
        headers = re.sub(r"// \w+\n", "", cpu_header).replace("emulator.h", "device.h")
        programs[Program(headers, cpu_src, tuple(variables), tuple(sorted(data or {})))] = None
        return made

    with patch.object(ops.kernel, "jt", SimpleNamespace(code=code)), emulated_cuda():
        for call in calls:
            call()
            jt.sync_all()
    return list(programs)


def translation_units(programs: list[Program]) -> dict[str, str]:
    """{name: text of a .cu file}: one for each set of headers."""
    units: dict[str, list[Program]] = {}
    for program in programs:
        units.setdefault(program.headers, []).append(program)
    named = {}
    for headers, several in units.items():
        name = "-".join(re.findall(r"(\w+)\.h", headers)[2:]) or "device"
        named[name] = PRELUDE + headers + "".join(each.function(i) for i, each in enumerate(several))
    return named


def compile_unit(nvcc: str, source: Path, archs: list[int]) -> subprocess.CompletedProcess:
    """Compile one file to an object for all ``archs`` (80 is sm_80); what ptxas says of each kernel is on stderr."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    command = [nvcc, *FLAGS, *targets, "-c", str(source), "-o", str(source.with_suffix(".o"))]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def spills(report: str) -> dict[str, int]:
    """{kernel: bytes of spill stores} of those that spill, from what ptxas says."""
    found = {}
    for name, stores in re.findall(r"Function properties for (\S+)\n.*?(\d+) bytes spill stores", report):
        if int(stores):
            found[name] = int(stores)
    return found
