"""How fast and how large the loss is, against the plain formula in PyTorch, eager and compiled, and on a GPU rivals.

    python -m benchmarks                  the quick list, under two minutes
    python -m benchmarks --device cuda    on a GPU; benchmarks/gpu.py builds and tests there as well
    python -m benchmarks --help           more cases, memory, a CSV file
    pytest benchmarks --benchmark-only    the same under pytest-benchmark, which saves and compares runs
    make plots                            README's table and the pictures, from the newest results

cases.py says what is timed, providers.py and rivals.py who competes, timing.py and memory.py how it is measured,
report.py and plot.py how it reads. check.py: nothing is timed before its loss and gradient agree with fp64.
"""
