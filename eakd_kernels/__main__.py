"""`python -m eakd_kernels`: the environment report that a bug report pastes. With a command: what it says.

cache: eakd_kernels/cache/command.py."""

import argparse
import platform
import sys

import torch

from . import __version__, env
from .dispatch import available_backends


def report() -> str:
    lines = [
        ("eakd_kernels", __version__),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda})"),
        ("triton", _version("triton")),
        ("python", f"{sys.version.split()[0]} on {platform.platform()}"),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
        ("threads", str(torch.get_num_threads())),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible"),
    ]
    lines += [(f"backend {name}", reason or "usable") for name, reason in available_backends().items()]
    lines += _extension()
    lines += [("environment", f"{name}={value}") for name, value in env.given().items()]
    return "\n".join(f"{name:<20} {value}" for name, value in lines)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _extension() -> list[tuple[str, str]]:
    try:
        from . import _C
    except ImportError as error:
        return [("extension", f"not there ({error})")]
    info = _C.build_info()
    built = f"torch {info['torch']}, C++ {info['cxx_standard']}, compiler {info['compiler']}"
    return [("extension", built), ("instruction set", _C.cpu_isa()), ("CUDA extension", _cuda_extension())]


def _cuda_extension() -> str:
    from .backends import cuda

    if cuda._C_cuda is None:
        return cuda.unavailable_reason()
    info = cuda._C_cuda.build_info()
    where = "" if cuda.EMULATOR is None else f", emulated: {cuda.EMULATOR}"
    return f"torch {info['torch']}, architectures {info['architectures']}{where}"


def main() -> None:
    parser = argparse.ArgumentParser("python -m eakd_kernels", description="Without a command: what runs here.")
    parser.add_argument("command", nargs="?", choices=["cache"], help="cache a teacher's top k over a corpus")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; `cache --help` lists them")
    given = parser.parse_args()
    if given.command is None:
        print(report())
    else:
        from .cache import command

        command.main(given.arguments)


if __name__ == "__main__":
    main()
