"""Compile the CUDA kernels for GPUs that are not there, and read from the machine code what these would run."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parents[2] / "csrc"
TARGETS = ("sm_80", "sm_90a", "sm_100")
PARAMETERS = {
    "small_rows": ("one_pass", "lanes", "columns", "student", "teacher", "width"),
    "resident_rows": ("multiple", "student", "teacher", "width"),
    "ring_rows": ("multiple", "student", "teacher", "width"),
    "stream_rows": ("one_pass", "multiple", "student", "teacher", "width"),
    "row_gradient": ("entropy", "student", "teacher", "width"),
    "recipe_rows": ("student", "teacher", "width"),
    "scale": ("student", "width"),
    "total": (),
}
BYTES = {"float": 4, "__nv_bfloat16": 2, "__half": 2}
RESERVED_SHARED = 1024  # that ptxas adds, from sm_90 on, to kernels with any shared memory


def tool(name: str) -> str | None:
    """On PATH, or in Triton's wheel; Triton is not imported."""
    found = shutil.which(name)
    triton = None if found else importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations if triton else ():
        found = found or shutil.which(name, path=Path(folder) / "backends/nvidia/bin")
    return found


TOOLS = {name: tool(name) for name in ("nvcc", "cuobjdump", "nvdisasm", "c++filt")}


class Kernel(NamedTuple):
    target: str
    family: str
    arguments: tuple[str, ...]
    registers: int
    stack: int
    local: int
    shared: int  # static
    instructions: Counter

    def __str__(self):
        return f"{self.family}<{', '.join(self.arguments)}> for {self.target}"

    def argument(self, parameter: str) -> str | None:
        """Of the template; None where this family has no such parameter."""
        return dict(zip(PARAMETERS[self.family], self.arguments, strict=True)).get(parameter)

    @property
    def one_pass(self) -> bool:
        return self.argument("one_pass") == "true"

    @property
    def width(self) -> int:
        """Columns of a vector; 1 where columns are read one by one."""
        return int(self.argument("width") or 1)

    @property
    def sides(self) -> list[int]:
        """Bytes of a vector of each of the tensors that are read."""
        dtypes = self.argument("student"), self.argument("teacher")
        return [self.width * BYTES[dtype] for dtype in dtypes if dtype]

    def count(self, name: str, *suffixes: str) -> int:
        """Instructions of that name that have all these suffixes: ("LDG", "128") counts LDG.E.EF.128."""
        split = ((instruction.split("."), n) for instruction, n in self.instructions.items())
        return sum(n for (first, *rest), n in split if first == name and set(suffixes) <= set(rest))


def output_of(name: str, *arguments, **options) -> str:
    done = subprocess.run([TOOLS[name], *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{name} {' '.join(map(str, arguments))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def kernels_of(source: Path, targets: tuple[str, ...], folder: Path, *flags: str) -> list[Kernel]:
    """Of a file that is compiled alone."""
    folder = folder / source.stem
    folder.mkdir()
    binary = folder / "object.o"
    architectures = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in targets]
    output_of("nvcc", "-std=c++17", f"-I{CSRC}", "--threads=2", *architectures, *flags, "-c", source, "-o", binary)
    output_of("cuobjdump", "-xelf", "all", binary, cwd=folder)
    return [kernel for target in targets for kernel in read(next(folder.glob(f"*.{target}.cubin")), target)]


def read(cubin: Path, target: str) -> list[Kernel]:
    usage = re.findall(r"Function (\S+):\s+(REG:.*)", output_of("cuobjdump", "-res-usage", cubin))
    sections = re.split(r"\n\t\.section\t\.text\.", output_of("nvdisasm", "-c", cubin))[1:]
    code = {section[: section.index(",")]: section for section in sections}
    assert code.keys() == dict(usage).keys()
    names = output_of("c++filt", input="\n".join(mangled for mangled, _ in usage)).splitlines()
    kernels = []
    for (mangled, used), name in zip(usage, names, strict=True):
        family, arguments = re.search(r"::(\w+)_kernel(?:<(.*?)>)?\(", name).groups()
        arguments = tuple(arguments.split(", ")) if arguments else ()
        used = {key: int(n) for key, n in re.findall(r"\b([A-Z]+):(\d+)", used)}
        if target != "sm_80" and used["SHARED"]:
            used["SHARED"] -= RESERVED_SHARED
        used = [used[key] for key in ("REG", "STACK", "LOCAL", "SHARED")]
        instructions = Counter(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code[mangled]))
        kernels.append(Kernel(target, family, arguments, *used, instructions))
    return kernels


def compile_all(jobs: dict[str, tuple]) -> dict[str, list[Kernel]]:
    """By name: the arguments of `kernels_of`. Begun in the order given."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(lambda job: kernels_of(*job), jobs.values()), strict=True))
