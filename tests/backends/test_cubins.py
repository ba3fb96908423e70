"""What the Triton kernels compile to, without a GPU: no spills, 128-bit loads, and no compilation twice."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
    pytest.skip("this Triton has no cuobjdump", allow_module_level=True)

HERE = Path(__file__).parent
TASKS = [
    ("table", 90),
    ("variants", 90),
    ("recipes", 90),
    ("kernels", 80),
    ("kernels", 100),
    ("bad", 90),
    ("recompilations", 90),
]
# Sweeps in the code that read both logits (statistics with guards against -inf and without), and that write a gradient.
SWEEPS = {
    "statistics_kernel": (2, 0),
    "partial_kernel": (2, 0),
    "gradient_kernel": (1, 1),
    "one_pass_kernel": (3, 1),
    "merged_one_pass_kernel": (1, 1),
    "merged_statistics_kernel": (0, 0),
}
MOST_ENTRIES = 40


def compile_for(task, capability, folder):
    """In a process of its own: the tests' interpreter and a compiler do not go together."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / f"{task}{capability}"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", HERE / "cubins.py", task, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TASKS, pool.map(lambda task: compile_for(*task, folder), TASKS), strict=True))


def complaints(made):
    """Why a GPU would run this slowly."""
    found = [f"{name} {made[name]}" for name in ("stack", "spills") if made[name]]
    if "columns" in made:
        reads, writes = SWEEPS[made["kernel"]]
        if made["rows"]:
            reads = min(reads, 1)  # whole rows are read once
        columns = max(made["rows"], 1) * made["columns"] // (32 * made["warps"])
        for name, tiles in (("loads_128", 2 * reads), ("stores_128", writes)):
            if made[name] < (expected := tiles * columns // made["width"]):
                found.append(f"{name} {made[name]}, of {expected}")
    return found


def assert_fast(entries):
    assert not {str(made): complaints(made) for made in entries if complaints(made)}


def test_launch_table(compiled):
    entries = compiled["table", 90]
    assert 30 <= len(entries) <= MOST_ENTRIES
    assert {made["kernel"] for made in entries} == {*SWEEPS, "total_kernel", "scale_kernel"}
    assert_fast(entries)
    walking = [made for made in entries if made.get("rows") == 0]
    assert max(made["registers"] for made in walking) <= 80  # three programs of 8 warps, six of 4, on a processor


@pytest.mark.parametrize("capability", [80, 100])
def test_other_processors(compiled, capability):
    assert {made["kernel"] for made in compiled["kernels", capability]} == {*SWEEPS, "total_kernel"}
    assert_fast(compiled["kernels", capability])


def test_variants_spill_nothing(compiled):
    assert not [made for made in compiled["variants", 90] if made["stack"] or made["spills"]]


def test_recipes(compiled):
    """Their loads are as wide as all others; nothing spills."""
    entries = [made for made in compiled["recipes", 90] if "columns" in made]
    assert len(entries) == 6
    assert not [made for made in entries if made["stack"] or made["spills"]]
    for made in entries:
        gradient, one_pass = made["kernel"] == "recipe_gradient_kernel", made["kernel"] == "recipe_one_pass_kernel"
        columns = max(made["rows"], 1) * made["columns"] // (32 * made["warps"]) // made["width"]
        assert made["loads_128"] >= 2 * columns * (1 if gradient or made["rows"] else 2)
        assert made["stores_128"] >= columns * (gradient or one_pass)


def test_bad_choices_are_noticed(compiled):
    """That the checks above can fail."""
    spilling, unaligned = (made for made in compiled["bad", 90] if "columns" in made)
    assert any("spills" in complaint for complaint in complaints(spilling))
    assert any("loads_128" in complaint for complaint in complaints(unaligned))


def test_no_shape_compiles_anew(compiled):
    """Rows, and vocabularies of the same bucket and alignment, are arguments and not compiled in."""
    counts = compiled["recompilations", 90]
    assert {name: count for name, count in counts.items() if "first" not in name and count} == {}
    assert all(count >= 3 for name, count in counts.items() if "first" in name)
