"""csrc/ -> eakd_kernels._C (CPU) and, where torch has CUDA and nvcc is there, eakd_kernels._C_cuda.

Metadata is in pyproject.toml; every EAKD_* variable is listed in eakd_kernels/env.py.
"""

import os
import re
import sys
from glob import glob

from setuptools import setup


def flags():
    """(for the C++ compiler, for the linker)"""
    debug = os.environ.get("EAKD_DEBUG") == "1"
    sanitize = [f"-fsanitize={kinds}"] if (kinds := os.environ.get("EAKD_SANITIZE")) else []
    # Sanitized code compiles in half the time at -O1, and runs no slower.
    optimize = ["-O0", "-g"] if debug else ["-O1" if sanitize else "-O3", "-g0"]
    return [*optimize, *sanitize], sanitize


def cpu_extension(cpp_extension):
    compile_flags, link_flags = flags()
    return cpp_extension.CppExtension(
        "eakd_kernels._C",
        [
            "csrc/module.cpp",
            "csrc/cpu/ops.cpp",
            "csrc/cpu/dispatch.cpp",
            "csrc/cpu/row_kernels_avx512.cpp",
            "csrc/cpu/row_kernels_avx2.cpp",
            "csrc/cpu/row_kernels_default.cpp",
            "csrc/cuda/plan.cpp",  # so that launch plans can be asked for anywhere
        ],
        depends=[*glob("csrc/*.h"), *glob("csrc/cpu/*.h"), "csrc/cuda/plan.h", "csrc/cuda/shapes.h"],
        # Without -fopenmp at::parallel_for compiles and runs on one thread. -Wno-psabi: vectors are never passed
        # between translation units.
        extra_compile_args=[
            *compile_flags,
            "-fopenmp",
            "-Wno-psabi",
            "-Wno-unknown-pragmas",
            "-Wno-maybe-uninitialized",
        ],
        extra_link_args=["-fopenmp", *link_flags],
    )


def cuda_home(cpp_extension):
    """A whole toolkit: torch takes the folder above an nvcc on PATH for one, even where that is a wrapper."""
    headers = "include/cuda_runtime_api.h", "targets/x86_64-linux/include/cuda_runtime_api.h"
    for home in (cpp_extension.CUDA_HOME, "/usr/local/cuda"):
        if home and os.path.exists(f"{home}/bin/nvcc") and any(os.path.exists(f"{home}/{path}") for path in headers):
            return home
    return None


def cuda_extension(cpp_extension, torch):
    """The extension, or the reason why there is none."""
    if os.environ.get("EAKD_NO_CUDA") == "1":
        return "EAKD_NO_CUDA=1"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    home = cuda_home(cpp_extension)
    if home is None:
        return "no CUDA toolkit was found; set CUDA_HOME to the folder that has bin/nvcc and include/cuda_runtime_api.h"
    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = home
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "those present")
    compile_flags, link_flags = flags()
    return cpp_extension.CUDAExtension(
        "eakd_kernels._C_cuda",
        [*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/module.cpp", "csrc/cuda/ops.cpp", "csrc/cuda/plan.cpp"],
        depends=[*glob("csrc/*.h"), *glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh")],
        define_macros=[("EAKD_CUDA_ARCHITECTURES", f'"{architectures}"')],
        extra_compile_args={"cxx": compile_flags, "nvcc": ["-O3"]},
        extra_link_args=link_flags,
    )


def version():
    with open("eakd_kernels/__init__.py") as file:
        return re.search(r'__version__ = "(.+)"', file.read()).group(1)


def build_tag(torch):
    """A compiled wheel fits one torch and one CUDA, and says so in its name; versions are compared without it."""
    minor = ".".join(torch.__version__.split(".")[:2])
    cuda = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    return f"1torch{minor}{cuda}"


def extensions():
    # A source distribution fits every torch, and needs none.
    if os.environ.get("EAKD_NO_EXT") == "1" or "sdist" in sys.argv:
        return {"version": version()}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"eakd_kernels compiles against the installed torch, which cannot be imported ({error}). Install torch "
            "first, or set EAKD_NO_EXT=1 for an install without kernels."
        ) from error

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"compiling eakd_kernels failed: {error}\nSet EAKD_NO_CUDA=1 to install without the CUDA kernels "
                    'or EAKD_NO_EXT=1 to install without any: everything works through backend="reference", slower.'
                ) from error

    found = cuda_extension(cpp_extension, torch)
    if isinstance(found, str):
        print(f"eakd_kernels: no CUDA kernels are compiled: {found}")
    return {
        "version": version(),
        "options": {"bdist_wheel": {"build_number": build_tag(torch)}},
        "ext_modules": [cpu_extension(cpp_extension), *([] if isinstance(found, str) else [found])],
        "cmdclass": {"build_ext": Build},
    }


setup(**extensions())
