"""Tests of the CUDA emulator in this directory (see include/cuda_runtime.h) by kernels of its own, in self_test.

Kernels that are right must come through under every schedule and sanitizer, faulty ones must be told by what is wrong
with them: a check that never fires would be missed nowhere else.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = sorted([*HERE.glob("*.cpp"), *HERE.glob("self_test/*.cpp")])
FLAGS = {
    "plain": ["-O1"],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "TSAN_OPTIONS": "atexit_sleep_ms=0",
}
IN_ORDER, REVERSED = 0, 2**64 - 1
SCHEDULES = [IN_ORDER, REVERSED, 5, 6]

CORRECT = [
    "arithmetic",
    "block_reduce",
    "cluster_exchange",
    "copy_pipeline",
    "copy_ring",
    "devices",
    "formats",
    "indices",
    "os_threads",
    "partial_warps",
    "recovery",
    "refusals",
    "schedules",
    "shuffles_and_votes",
]

# What is in the message, whatever the schedule.
FAULTS = {
    "arrive_twice": "cluster_arrive twice .* of block",
    "barrier_initialised_twice": "already initialised",
    "barrier_not_initialised": "not initialised, or was overwritten",
    "barrier_outside_of_shared": "barrier outside of the block's dynamic shared memory",
    "barrier_overwritten": "not initialised, or was overwritten",
    "barrier_without_fence": "no barrier_init_fence",
    "copies_overlap": "another copy is still on its way",
    "copy_brings_too_little": "deadlock.*expects 128 bytes, was given copies of 64",
    "copy_brings_too_much": "deadlock.*expects 64 bytes, was given copies of 128",
    "copy_from_misaligned": "bulk_copy from an address that is no multiple of 16",
    "copy_lacks_arrival": "deadlock.*lacks 1 of 2 arrivals",
    "copy_of_nothing": "bulk_copy of 0 bytes",
    "copy_of_odd_size": "bulk_copy of 24 bytes",
    "copy_onto_barrier": "bulk_copy onto a barrier",
    "copy_past_shared": "bulk_copy to outside",
    "copy_to_misaligned": "bulk_copy to an address that is no multiple of 16",
    "divergent_block_barrier": r"deadlock.*thread \(0,0,0\) of block \(0,0,0\) waits at __syncthreads, .* 31 more",
    "divergent_cluster_barrier": r"deadlock.*block \(1,0,0\) returned.*block \(2,0,0\) waits at cluster_wait",
    "divergent_warp": "deadlock.*waits at __shfl_xor_sync with mask 0xffffffff",
    "lane_outside_its_mask": "a lane that is not in the mask of its own",
    "mask_of_absent_lanes": "names lanes that the block does not have",
    "mixed_warp_operations": "other lanes are in another operation",
    "no_clusters_on_sm80": "needs compute capability 9.0",
    "odd_width": "no power of two",
    "remote_after_exit": "CTA 1 of .*(has exited|may exit before)",
    "remote_before_start": "has not waited for its cluster before",
    "remote_past_the_end": "outside of dynamic shared memory",
    "remote_to_absent_cta": "CTA 2, which there is not",
    "remote_to_local_variable": "outside of dynamic shared memory",
    "return_before_barrier": r"deadlock.*thread \(5,0,0\) of block \(0,0,0\) returned.* 62 more",
    "shuffle_from_absent_lane": r"reads lane \d+, which is not in its mask",
    "shuffle_from_outside_the_mask": "reads lane 20, which is not in its mask",
    "shuffle_with_returned_lane": r"thread \(31,0,0\) of block \(0,0,0\) returned",
    "too_many_arrivals": "more arrivals",
    "too_many_bytes": "expects more than 2.20 - 1 bytes",
    "wait_without_arriving": "cluster_wait without a cluster_arrive",
    "wide_load_misaligned": "misaligned address",
}
# Of these, ASan sees more, and some schedules hide some.
FAULTS_IN_ORDER = {
    "copy_without_wait": "exits while a bulk_copy",
    "read_before_wait": "read NaN before the wait",
    "vote_with_returned_lane": r"lane that has returned, thread \(0,0,0\)",
    "write_past_shared": "just outside of its dynamic shared memory",
}

FOUND_BY_ASAN = {
    "copy_past_the_end": "heap-buffer-overflow",
    "global_past_the_end": "heap-buffer-overflow",
    "read_of_pending_copy": "use-after-poison",
    "shared_past_the_end": "use-after-poison",
}
FOUND_BY_TSAN = [
    "missing_block_barrier",
    "missing_cluster_barrier",
    "other_half_of_warp",
    "refill_while_read",
    "shuffle_as_barrier",
]


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Returns the self-test program of a kind of build."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    programs, folder = {}, tmp_path_factory.mktemp("self_test")

    def compiled(kind, source):
        path = folder / f"{kind}_{source.stem}.o"
        include = ["-I", HERE / "include"]
        command = [compiler, "-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", *FLAGS[kind], *include]
        subprocess.run([*command, "-c", source, "-o", path], check=True, timeout=120)
        return path

    def program(kind):
        if kind not in programs:
            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(lambda source: compiled(kind, source), SOURCES))
            path = folder / f"self_test_{kind}"
            subprocess.run([compiler, *FLAGS[kind], "-pthread", *objects, "-o", path], check=True, timeout=60)
            programs[kind] = path
        return programs[kind]

    return program


def run(program, case, schedule=IN_ORDER):
    return subprocess.run(
        [program, case, str(schedule)], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )


def line_of(case):
    """The line of sanitized.cpp that a report should name."""
    lines = (HERE / "self_test" / "sanitized.cpp").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"// {case}"))


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernel(build, kind, case):
    for schedule in SCHEDULES if kind != "tsan" else [REVERSED, 5]:
        result = run(build(kind), case, schedule)
        assert result.returncode == 0, (schedule, result.stdout, result.stderr)
        assert not result.stderr


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("case", FAULTS)
def test_fault(build, kind, case):
    for schedule in SCHEDULES if kind == "plain" else [IN_ORDER]:
        result = run(build(kind), case, schedule)
        assert result.returncode == 3, (schedule, result.stdout, result.stderr)
        assert re.search(FAULTS[case], result.stdout, re.DOTALL), (schedule, result.stdout)
        assert not result.stderr


@pytest.mark.parametrize("case", FAULTS_IN_ORDER)
def test_fault_in_order(build, case):
    result = run(build("plain"), case)
    assert result.returncode == 3, result.stderr
    assert re.search(FAULTS_IN_ORDER[case], result.stdout)


@pytest.mark.parametrize("case", FOUND_BY_ASAN)
def test_fault_found_by_asan(build, case):
    result = run(build("asan"), case)
    assert result.returncode not in (0, 3)
    assert FOUND_BY_ASAN[case] in result.stderr
    assert f"sanitized.cpp:{line_of(case)}" in result.stderr


@pytest.mark.parametrize("case", FOUND_BY_TSAN)
def test_fault_found_by_tsan(build, case):
    result = run(build("tsan"), case, REVERSED)
    assert "data race" in result.stderr
    assert f"sanitized.cpp:{line_of(case)}" in result.stderr


def test_some_schedule_delivers_copies_at_once(build):
    """Else nothing would show a kernel whose copies must not be early."""
    outcomes = {run(build("plain"), "read_before_wait", seed).returncode for seed in range(1, 9)}
    assert outcomes == {0, 3}


def test_static_shared_memory_is_refused(build, tmp_path):
    source = tmp_path / "static.cpp"
    source.write_text("#include <cuda_runtime.h>\n__global__ void kernel() { __shared__ float values[4]; }\n")
    command = ["g++", "-std=c++17", "-I", HERE / "include", "-fsyntax-only", source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode != 0
    assert "static __shared__ is not emulated" in result.stderr


def test_every_case_is_run(build):
    listed = subprocess.run([build("plain")], capture_output=True, text=True, timeout=60, check=False).stdout.split()
    tested = {*CORRECT, *FAULTS, *FAULTS_IN_ORDER, *FOUND_BY_ASAN, *FOUND_BY_TSAN}
    assert set(listed) == tested | {"speed"}
