"""This package beside others that distil: time, memory and error on the same inputs, `python -m benchmarks.rivals`.

packages.py   losses on logits, as they are published; none of them weights by entropy
hidden.py     losses on hidden states and output heads
formulas.py   what they must agree with
cases.py, entries.py, measure.py   what is measured, who takes part, and how; nothing wrong is timed
table.py, pictures.py              how it reads
training.py   the same losses in a training loop, `make demo-rivals`
"""
