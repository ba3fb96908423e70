"""What the CUDA kernels compile to, without a GPU: no spills, few registers, wide loads, and Hopper's instructions
where they belong. The numbers are those of nvcc 13.0."""

import pytest
from cuda_binaries import CSRC, PARAMETERS, TARGETS, TOOLS, compile_all

if missing := [name for name, path in TOOLS.items() if path is None]:
    pytest.skip(f"not on this machine: {', '.join(missing)}", allow_module_level=True)

# The first six are at their launch bounds, or near. What varies: columns a lane, and the student's entropy.
MOST_REGISTERS = {
    ("resident_rows", None): 128,
    ("ring_rows", None): 128,
    ("stream_rows", None): 128,
    ("recipe_rows", None): 128,
    ("small_rows", "16"): 112,
    ("small_rows", "32"): 128,
    ("row_gradient", "false"): 80,
    ("row_gradient", "true"): 104,
    ("scale", None): 40,
    ("total", None): 32,
}
RESIDENT_VECTORS, BATCH, RING_BATCH = 10, 4, 2
CLUSTERS = {"UCGABAR_ARV", "UCGABAR_WAIT"}
COPIES = {"UBLKCP", "SYNCS"}
OF_HOPPER = {
    **dict.fromkeys(("resident_rows", "stream_rows", "recipe_rows"), CLUSTERS),
    "ring_rows": CLUSTERS | COPIES,
}
# Compiling all of it for one target takes a minute and more. sm_100 runs the code of sm_90a: the two with most of
# Hopper's stand for the others. sm_80's others are for `make exhaustive`.
SAMPLES = {
    "sm_80": {"small_rows", "resident_rows", "row_gradient", "scale", "total"},
    "sm_100": {"resident_rows", "ring_rows"},
}

# Kernels that must not pass: one without the registers for its columns, and one whose vectors are not aligned.
BAD_CHOICES = {
    "spilling": """
        #undef __launch_bounds__
        #define __launch_bounds__(...)
    """,
    "unaligned": """
        struct Unaligned { unsigned x, y, z, w; };
        __device__ Unaligned __ldcs(const Unaligned* p) { return *p; }
        __device__ void __stcs(Unaligned* p, Unaligned value) { *p = value; }
        #define uint4 Unaligned
    """,
}
BAD_FLAGS = {"spilling": ["-maxrregcount=32"], "unaligned": []}
BAD_SOURCE = """
    #include <cuda_bf16.h>
    #include <cuda_fp16.h>
    {}
    #include "cuda/resident_rows.cuh"
    auto* kernel = eakd::cuda::resident_rows_kernel<1, float, float, 4>;
"""


def targets_of(file):
    return tuple(target for target in TARGETS if file in SAMPLES.get(target, (file,)))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Kernels by file. stream_rows.cu takes longest and is begun first."""
    folder = tmp_path_factory.mktemp("cuda")
    sources = sorted(CSRC.rglob("*.cu"), reverse=True)
    jobs = {source.stem: (source, targets_of(source.stem), folder) for source in sources}
    for name, definitions in BAD_CHOICES.items():
        source = folder / f"{name}.cu"
        source.write_text(BAD_SOURCE.format(definitions))
        jobs[name] = source, ("sm_90a",), folder, *BAD_FLAGS[name]
    return compile_all(jobs)


def kernels_for(compiled, target):
    return [k for file, kernels in compiled.items() if file not in BAD_CHOICES for k in kernels if k.target == target]


def batches(kernel):
    """Vectors of a side that its code loads, at least, and vectors that it stores."""
    if kernel.family == "small_rows":
        vectors = int(kernel.argument("columns")) // kernel.width
        return vectors, vectors * kernel.one_pass
    return {
        "resident_rows": (RESIDENT_VECTORS, RESIDENT_VECTORS),
        "ring_rows": (RING_BATCH, 1),
        "recipe_rows": (BATCH, 1),
        "stream_rows": (BATCH * (1 + kernel.one_pass), BATCH * kernel.one_pass),
    }.get(kernel.family, (BATCH, BATCH))


def complaints(kernel):
    """Why a GPU would run this slowly, or not at all."""
    found = [f"{name} {getattr(kernel, name)}" for name in ("stack", "local", "shared") if getattr(kernel, name)]
    if spills := kernel.count("STL") + kernel.count("LDL"):
        found.append(f"spills {spills}")
    variant = kernel.argument("columns") or kernel.argument("entropy")
    if kernel.registers > (most := MOST_REGISTERS[kernel.family, variant]):
        found.append(f"registers {kernel.registers}, of {most}")

    of_hopper = OF_HOPPER.get(kernel.family, set()) if kernel.target != "sm_80" else set()
    for name in sorted(CLUSTERS | COPIES):
        if bool(n := kernel.count(name)) != (name in of_hopper):
            found.append(f"{name} {n}")

    if kernel.family == "ring_rows" and kernel.target == "sm_80":
        return found  # a trap: no ring is launched there
    if kernel.width == 1:
        if n := kernel.count("LDG", "128") + kernel.count("STG", "128"):
            found.append(f"vectors {n}, of columns one by one")
        return found
    loads, stores = batches(kernel)
    load = "LDS" if kernel.family == "ring_rows" else "LDG"
    for side in sorted(set(kernel.sides)):
        expected, bits = loads * kernel.sides.count(side), str(8 * side)
        if (n := kernel.count(load, bits)) < expected:
            found.append(f"{load}.{bits} {n}, of {expected}")
    if (n := kernel.count("STG", "128")) < stores:  # of the student's dtype, which is never the narrower one
        found.append(f"STG.128 {n}, of {stores}")
    return found


def assert_fast(kernels):
    assert not {str(kernel): complaints(kernel) for kernel in kernels if complaints(kernel)}


def test_every_kernel_is_found(compiled):
    """The same ones for every target, so that no check below passes because names were not understood."""
    found = {t: sorted((k.family, k.arguments) for k in kernels_for(compiled, t)) for t in TARGETS}
    every = found["sm_90a"]
    assert {family for family, _ in every} == PARAMETERS.keys()
    assert len(set(every)) == len(every) > 100
    for target, families in SAMPLES.items():
        assert found[target] == [kernel for kernel in every if kernel[0] in families]
    pairs = {tuple(kernel.sides) for kernel in kernels_for(compiled, "sm_90a") if kernel.width > 1}
    assert pairs == {(16, 16), (16, 8), (16,)}


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_are_fast(compiled, target):
    """No stack, no static shared memory, registers within the table; vectors in vector instructions, and each of
    Hopper's instructions exactly where it belongs."""
    assert_fast(kernels_for(compiled, target))


@pytest.mark.exhaustive
def test_the_others_on_sm_80_are_fast(tmp_path):
    rest = [source for source in CSRC.rglob("*.cu") if source.stem not in SAMPLES["sm_80"]]
    found = compile_all({source.stem: (source, ("sm_80",), tmp_path) for source in rest})
    assert found.keys() == {"stream_rows", "ring_rows", "recipe_rows"} and all(found.values())
    assert_fast([kernel for kernels in found.values() for kernel in kernels])


@pytest.mark.parametrize("target", TARGETS)
def test_shared_exponentials(compiled, target):
    """Where t is a multiple of tau, each column pair takes two exponentials less in the fast sums."""
    vectors = {"resident_rows": RESIDENT_VECTORS, "stream_rows": BATCH, "ring_rows": RING_BATCH}
    alike = {}
    for kernel in kernels_for(compiled, target):
        if kernel.family in vectors and kernel.width > 1:
            but_for_multiple = kernel.family, kernel.width, kernel.one_pass, *kernel.arguments[-3:]
            alike.setdefault(but_for_multiple, {})[kernel.argument("multiple")] = kernel.count("MUFU", "EX2")
    for (family, width, *_), counts in alike.items():
        assert counts.keys() == {"0", "1", "3"}
        saved = 2 * width * vectors[family]
        assert saved <= counts["0"] - counts["3"] <= saved + 20
        assert counts["1"] == counts["3"]


@pytest.mark.parametrize("target", TARGETS)
def test_exponentials_of_resident_rows(compiled, target):
    """Sums, gradient, and a hard label's term in each. Beside these only where rows are merged and guarded."""
    for kernel in kernels_for(compiled, target):
        if kernel.family == "resident_rows":
            of_sums = 4 if kernel.argument("multiple") == "0" else 2
            needed = RESIDENT_VECTORS * kernel.width * (of_sums + 1 + 2 + 1)
            assert needed <= kernel.count("MUFU", "EX2") <= needed + 64, str(kernel)


def test_bad_choices_are_noticed(compiled):
    """That the checks above can fail."""
    (spilling,), (unaligned,) = compiled["spilling"], compiled["unaligned"]
    assert any("spills" in complaint for complaint in complaints(spilling))
    assert any("stack" in complaint for complaint in complaints(spilling))
    assert {complaint.split()[0] for complaint in complaints(unaligned)} == {"LDG.128", "STG.128"}
    (resident,) = (k for k in kernels_for(compiled, "sm_90a") if k[1:3] == spilling[1:3])
    assert complaints(resident) == []
    assert complaints(resident._replace(registers=129)) == ["registers 129, of 128"]
    assert complaints(resident._replace(target="sm_80"))
    assert complaints(resident._replace(arguments=("1", "float", "float", "1")))
    assert complaints(resident._replace(shared=16)) == ["shared 16"]
