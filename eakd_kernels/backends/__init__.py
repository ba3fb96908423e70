"""One module a backend. Each has

    unavailable_reason() -> str | None                  why it cannot run on this machine
    unsupported_reason(device, dtypes) -> str | None    why it cannot take these tensors

A kernel backend has the operators, with the arguments of eakd_kernels.ops:

    row_statistics(rows, temperature_slopes) -> Tensor
    row_gradient(rows, statistics, upstream, gradient)  writes `gradient`
    one_pass(rows, rule, gradient) -> (loss, statistics), writes `gradient`
    scale_gradient(gradient, factor, out)               `out` may be `gradient`

`reference` has statistics(rows), which PyTorch differentiates. Backends import neither one another nor anything above
ops.
"""
