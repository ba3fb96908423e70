"""csrc/ -> eakd_kernels._C. Metadata is in pyproject.toml; every EAKD_* variable is listed in eakd_kernels/env.py."""

import os

from setuptools import setup


def extensions():
    if os.environ.get("EAKD_NO_EXT") == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"eakd_kernels compiles against the installed torch, which cannot be imported ({error}). Install torch "
            "first, or set EAKD_NO_EXT=1 for an install without kernels."
        ) from error

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"compiling eakd_kernels._C failed: {error}\nSet EAKD_NO_EXT=1 to install without kernels: "
                    'everything works through backend="reference", more slowly.'
                ) from error

    debug = os.environ.get("EAKD_DEBUG") == "1"
    optimisation = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    sanitize = [f"-fsanitize={kinds}"] if (kinds := os.environ.get("EAKD_SANITIZE")) else []
    sources = [
        "csrc/module.cpp",
        "csrc/cpu/ops.cpp",
        "csrc/cpu/dispatch.cpp",
        "csrc/cpu/row_kernels_avx512.cpp",
        "csrc/cpu/row_kernels_avx2.cpp",
        "csrc/cpu/row_kernels_default.cpp",
    ]
    extension = CppExtension(
        "eakd_kernels._C",
        sources,
        depends=[f"csrc/{name}" for name in ("row_state.h", "cpu/simd.h", "cpu/row_kernels.h", "cpu/rows.h")],
        # Without -fopenmp at::parallel_for compiles and runs on one thread. -Wno-psabi: vectors are never passed
        # between translation units.
        extra_compile_args=[
            *optimisation,
            *sanitize,
            "-fopenmp",
            "-Wno-psabi",
            "-Wno-unknown-pragmas",
            "-Wno-maybe-uninitialized",
        ],
        extra_link_args=["-fopenmp", *sanitize],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**extensions())
