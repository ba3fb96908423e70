"""How fast and how large the loss is, against the plain formula in PyTorch, eager and compiled.

    python -m benchmarks            the quick list, under two minutes
    python -m benchmarks --help     more cases, memory, a CSV file

cases.py says what is timed, providers.py who competes, timing.py and memory.py how it is measured, report.py how it
reads. Nothing is timed before its loss and gradient agree with fp64.
"""
