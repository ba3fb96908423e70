"""What a person with a GPU runs, with or without make: python3 benchmarks/gpu.py check|bench|rivals [--results FOLDER]

check    builds, runs every test marked gpu, and a few of them under compute-sanitizer where the machine allows it
bench    times the GPU cases; the short table and the goals come last
rivals   the losses of other packages beside ours: those that are installed

Uses the running Python and what is installed there, no network. Each takes at most eight minutes. check leaves a log
and the tests' XML in the folder, bench a CSV file, and rivals one in its folder rivals.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
MINUTES = 8
BUILD_TOOLS = {"setuptools": 77, "wheel": 0, "pybind11": 0, "ninja": 0}  # from which version on
# Small tests that launch every kernel: compute-sanitizer makes them ten to a hundred times as slow.
SANITIZED = "conformance or every_kernel"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")  # in the order of what they are worth
SANITIZER_FOUND = 86  # an exit status that neither pytest nor Python has
EXPLAINED = {5: "no such test is marked gpu", 124: "out of time", 137: "out of time"}


def why_no_gpu() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch ({error}); name one that has: make gpu PYTHON=..."
    if torch.cuda.is_available():
        return None
    return f"no GPU: torch {torch.__version__} (CUDA {torch.version.cuda}) of {sys.executable} sees none"


class Steps:
    """Runs commands one after the other within the time there is; keeps their output and what became of them."""

    def __init__(self, log: Path, minutes: float):
        self.end, self.outcomes = time.monotonic() + 60 * minutes, {}
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("w")

    def seconds_left(self) -> int:
        return int(self.end - time.monotonic())

    def run(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
        """The exit status, 124 where time ran out, and the output, which is shown as it comes."""
        self.show(f"\n== {name}: {' '.join(command)}\n")
        lines = []
        with subprocess.Popen(
            ["timeout", "--kill-after=10", str(max(1, self.seconds_left())), *command],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout:
                self.show(line)
                lines.append(line)
        return process.returncode, "".join(lines)

    def show(self, text: str) -> None:
        print(text, end="", flush=True)
        self.log.write(text)

    def note(self, name: str, ok: bool, what: str) -> None:
        self.outcomes[name] = ok, what

    def summary(self) -> int:
        """Shows what became of every step. 0 where none failed."""
        self.show("\n")
        for name, (ok, what) in self.outcomes.items():
            self.show(f"{name}: {'' if ok else 'FAILED: '}{what}\n")
        self.log.close()
        return 0 if all(ok for ok, _ in self.outcomes.values()) else 1


def check(results: Path) -> int:
    steps = Steps(results / "gpu-check.log", MINUTES - 0.5)
    install(steps)
    run_tests(steps, results / "gpu-check.xml")
    sanitize(steps)
    return steps.summary()


def install(steps: Steps) -> None:
    """In place. Without a compiler the package is pure Python, and so are its Triton kernels."""
    missing = missing_tools()
    if missing:
        steps.show(f"missing: {', '.join(missing)}; EAKD_NO_EXT=1: goes on without compiling\n")
        os.environ["EAKD_NO_EXT"] = "1"
    if any(tool.startswith("setuptools") for tool in missing):
        steps.note("install", True, f"skipped, runs from this folder: missing {', '.join(missing)}")
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-build-isolation", "--no-deps"]
    status, _ = steps.run("install", [*pip, "--editable", "."])
    what = f"pure Python: missing {', '.join(missing)}" if missing else "compiled"
    steps.note("install", status == 0, what if status == 0 else f"status {status}")


def missing_tools() -> list[str]:
    missing = []
    for tool, at_least in BUILD_TOOLS.items():
        try:
            version = metadata.version(tool)
        except metadata.PackageNotFoundError:
            missing.append(tool)
            continue
        if int(version.split(".")[0]) < at_least:
            missing.append(f"{tool}>={at_least}")
    return missing if shutil.which(os.environ.get("CXX", "c++")) else [*missing, "a C++ compiler"]


def run_tests(steps: Steps, xml: Path) -> None:
    command = pytest_on_gpu(steps)
    if importlib.util.find_spec("xdist") is not None:  # most of the time goes into compiling some 400 kernels
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    status, output = steps.run("tests", [*command, f"--junit-xml={xml}"])
    steps.note("tests", status == 0, outcome(status, output))


def pytest_on_gpu(steps: Steps) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu"]
    for package in ("hypothesis", "pyarrow", "transformers"):
        if importlib.util.find_spec(package) is None:  # pytest would stop where it cannot import a file
            imports = re.compile(rf"^(from|import) {package}\b", re.MULTILINE)
            files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if imports.search(path.read_text())]
            steps.show(f"{package} is missing: without {', '.join(path.name for path in files)}\n")
            command += [f"--ignore={path.relative_to(ROOT)}" for path in files]
    return command


def outcome(status: int, output: str) -> str:
    """What pytest says at the end, and compute-sanitizer after it."""
    if status in EXPLAINED:
        return EXPLAINED[status]
    last = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|error).*?)\s*=*$", output, re.MULTILINE)[-1:]
    last += re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)[-1:]
    return "; ".join(last) or f"status {status}"


def sanitize(steps: Steps) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        steps.note("compute-sanitizer", True, "skipped: neither on the PATH nor in /usr/local/cuda/bin")
        return
    # PyTorch's caching would hide a small overrun inside a large block.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watch = [tool, "--target-processes=application-only", f"--error-exitcode={SANITIZER_FOUND}"]
    launch = [sys.executable, "-c", "import torch; torch.ones(8, device='cuda').sum().item()"]
    status, output = steps.run("compute-sanitizer", [*watch, *launch], environment)
    if status:
        steps.note("compute-sanitizer", True, f"skipped: {refusal(status, output)}")
        return
    for kind in SANITIZERS:
        if steps.seconds_left() < 60:
            steps.note(kind, True, "skipped: out of time")
            continue
        tests = [*pytest_on_gpu(steps), "-k", SANITIZED]
        status, output = steps.run(kind, [*watch, f"--tool={kind}", *tests], environment)
        unfinished = status in EXPLAINED
        what = outcome(status, output)
        steps.note(kind, status == 0 or unfinished, f"skipped: {what}" if unfinished else what)


def refusal(status: int, output: str) -> str:
    """What compute-sanitizer says where the machine does not let it work."""
    lines = [line.removeprefix("=========").strip() for line in output.splitlines()]
    told = [line for line in lines if line and "COMPUTE-SANITIZER" not in line]
    errors = [line for line in told if "error" in line.lower()]
    return (errors or told or [f"status {status}"])[0]


def bench(results: Path) -> int:
    return timed("benchmarks", results)


def rivals(results: Path) -> int:
    return timed("benchmarks.rivals", results / "rivals")


def timed(module: str, results: Path) -> int:
    limit = ["timeout", "--kill-after=10", str(60 * MINUTES)]
    command = [sys.executable, "-m", module, "--device", "cuda", "--minutes", str(MINUTES - 1.5)]
    status = subprocess.run([*limit, *command, "--out", str(results)], cwd=ROOT).returncode
    if status:
        print(f"{module}: FAILED: {'out of time' if status == 124 else f'status {status}'}")
    return 1 if status else 0


RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = {"check": (check, ROOT / "out" / "gpu"), "bench": (bench, RESULTS), "rivals": (rivals, RESULTS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--results", type=Path, help="default: out/gpu for check, benchmarks/results for the others")
    arguments = parser.parse_args()
    if reason := why_no_gpu():
        raise SystemExit(reason)
    command, results = COMMANDS[arguments.command]
    raise SystemExit(command((arguments.results or results).resolve()))


if __name__ == "__main__":
    main()
