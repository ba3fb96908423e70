"""The kernels of csrc/cuda on the emulator without torch (driver/), under sanitizers, and with bugs put into them.

Each mutant is a copy of csrc with one seeded bug that must be found, and by what it should be found: tests that pass
whatever the kernels do, and schedules that hide every race, would be noticed nowhere else.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutants import MUTANTS

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
DRIVER = HERE / "driver"
COMPILER = "g++"
FLAGS = {
    "plain": [],
    "asan": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-g1", "-fsanitize=thread"],
}
# What is compiled once. With ASan, and of the kernels, that would take longer than it saves.
OPTIMISED = {"plain": ["-O1"], "asan": [], "tsan": ["-O1"]}
ENVIRONMENT = {**os.environ, "TSAN_OPTIONS": "atexit_sleep_ms=0 halt_on_error=1"}
SCHEDULES = ["0", str(2**64 - 1), "5"]  # in order, reversed, random
# Kernels<...> of driver/kernels.h. Mutants are of the first, which the driver runs first; the others are as they were.
TYPES = ["float,3", "float,0", "__nv_bfloat16,1"]

# One of each sort of bug, in every run of the tests. The others are for `make exhaustive`, and so are the kernels under
# ASan, which `make sanitize` has in torch's process.
ALWAYS = {
    "vector_tail_too_long",
    "merge_without_barrier",
    "cluster_left_early",
    "copy_not_awaited",
    "cross_term_after_teacher_sum",
}
EXHAUSTIVE = pytest.mark.exhaustive

# Of the driver's groups of cases, and for the slower builds the smaller ones of these.
KERNELS = ["small", "resident", "ring", "stream", "two_pass", "total", "scale", "recipe"]
GROUPS = {
    "plain": [*KERNELS, "long"],
    "asan": [f"{name}:few" for name in KERNELS],
    "tsan": [f"{name}:few" for name in KERNELS],
}


class Builds:
    """Compiles and runs in the background, two at a time. Whatever a task waits for was handed in before it."""

    def __init__(self, folder):
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        self.objects, self.programs = {}, {}

    def start(self, kind, group, mutant=None):
        """A future of the finished run of a group's cases."""
        if kind not in self.objects:
            self.objects[kind] = self.start_objects(kind)
        name = f"{kind}_{mutant}"
        if name not in self.programs:
            self.programs[name] = self.pool.submit(self.program, kind, name, mutant)
        return self.pool.submit(self.run, self.programs[name], group)

    def start_objects(self, kind):
        """The objects of the kernels, in the order of TYPES and those for recipes, and all others."""
        kernels = [self.pool.submit(self.kernels, kind, f"{kind}_kernels_{types}", types) for types in TYPES]
        kernels.append(self.pool.submit(self.recipe_kernels, kind, f"{kind}_kernels_recipe"))
        sources = [DRIVER / "driver.cpp", *sorted(HERE.glob("*.cpp"))]
        others = [
            self.pool.submit(self.compile, kind, source, f"{kind}_{source.stem}", *OPTIMISED[kind])
            for source in sources
        ]
        return kernels, others

    def program(self, kind, name, mutant):
        kernels, others = self.objects[kind]
        objects = [task.result() for task in (*kernels, *others)]
        if mutant is not None:
            csrc = self.mutated(name, MUTANTS[mutant])
            if MUTANTS[mutant].group == "recipe":
                objects[len(TYPES)] = self.recipe_kernels(kind, name, csrc)
            else:
                # In front: of an inline function that several objects have, the linker takes the first.
                objects[0] = self.kernels(kind, name, TYPES[0], csrc)
        path = self.folder / name
        subprocess.run([COMPILER, *FLAGS[kind], "-pthread", *objects, "-o", path], check=True, timeout=60)
        return path

    def kernels(self, kind, name, types, csrc=CSRC):
        return self.compile(kind, DRIVER / "kernels.cpp", name, f"-DEAKD_DRIVER_TYPES={types}", csrc=csrc)

    def recipe_kernels(self, kind, name, csrc=CSRC):
        return self.compile(kind, DRIVER / "recipe_kernels.cpp", name, csrc=csrc)

    def compile(self, kind, source, name, *flags, csrc=CSRC):
        path = self.folder / f"{name}.o"
        flags = [*FLAGS[kind], *flags, "-std=c++20", "-DEAKD_EMULATED", "-fno-strict-aliasing"]
        flags += ["-Wno-attributes", "-Wno-unknown-pragmas", "-I", HERE / "include", "-I", csrc]
        subprocess.run([COMPILER, *flags, "-c", source, "-o", path], check=True, timeout=120)
        return path

    def mutated(self, name, mutant):
        csrc = self.folder / f"{name}_csrc"
        shutil.copytree(CSRC, csrc)
        text = (csrc / mutant.file).read_text()
        # So that a change of the kernels cannot leave a mutant that is none.
        assert text.count(mutant.old) == 1, f"{mutant.file} does not have once\n{mutant.old}"
        (csrc / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        return csrc

    def run(self, program, group):
        command = [program.result(), group, *SCHEDULES]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="session")
def runs(request, tmp_path_factory):
    """Futures of the runs that the tests of this session ask for."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"needs {COMPILER}")
    builds = Builds(tmp_path_factory.mktemp("mutations"))
    wanted = [item.callspec.params["job"] for item in request.session.items if item.path == Path(__file__)]
    yield {job: builds.start(*job) for job in wanted}
    builds.pool.shutdown(cancel_futures=True)


def jobs_of_kernels():
    for kind in FLAGS:
        for group in GROUPS[kind]:
            yield pytest.param((kind, group), id=f"{kind}-{group}", marks=[EXHAUSTIVE] if kind == "asan" else [])


@pytest.mark.parametrize("job", list(jobs_of_kernels()))
def test_kernels(runs, job):
    result = runs[job].result()
    assert result.returncode == 0, result.stdout + result.stderr
    assert not result.stderr


def jobs_of_mutants():
    for name, mutant in MUTANTS.items():
        for kind in mutant.found:
            group = mutant.group if kind == "plain" else f"{mutant.group}:few"
            always = name in ALWAYS and kind != "asan"
            yield pytest.param((kind, group, name), id=f"{name}-{kind}", marks=[] if always else [EXHAUSTIVE])


@pytest.mark.parametrize("job", list(jobs_of_mutants()))
def test_mutant(runs, job):
    kind, _, name = job
    result = runs[job].result()
    assert result.returncode != 0, "not found"
    assert re.search(MUTANTS[name].found[kind], result.stdout + result.stderr), result.stdout + result.stderr
