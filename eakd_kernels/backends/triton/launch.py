"""From tensors to launches: how rows lie, which tile fits, how programs share the work."""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import triton

from ... import divergences, ops
from .arithmetic import INTERPRETED
from .recipe import Recipe, RecipeFeatures
from .row_state import HARD_AT_T, HARD_AT_TAU, HARD_OWN, NO_HARD, Features, Temperatures
from .rows import PerRow, RowPairs
from .tiles import COLUMNS, STRIDED, VECTORS, WINDOW, Matrix, Tile, unspecialised

LOG2_E = math.log2(math.e)

# The first pair with P tau = Q t is the cheapest way to the exponentials at both temperatures.
RATIOS = ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (1, 4), (3, 2), (2, 3), (3, 4), (4, 3))

MIXTURES = {kind.code for kind in (divergences.JSD, divergences.SkewForwardKL, divergences.SkewReverseKL)}

# ---- the launch table --------------------------------------------------------------------------------------------

# Columns a tile and warps of a program that walks along a row, by the bytes of the wider logit. 16 columns a thread, 8
# of fp32, leave registers for enough programs on a processor to hide each other's loads; tests/backends/test_cubins.py
# holds the table to it.
WALKING = {2: (2048, 4), 4: (2048, 8)}
# From sm_100 on the compiler pairs up fp32 operations, which takes registers: 8 columns a thread.
WALKING_IN_PAIRS = {2: (2048, 8), 4: (2048, 8)}
# A recipe's sums at several temperatures take registers too: columns a thread.
RECIPE_COLUMNS = 8
# A tile of whole rows: at most this many columns, in powers of two from the least on.
LEAST_COLUMNS, MOST_COLUMNS, ELEMENTS = 32, 4096, 2048

VECTOR_BYTES = 16
PROGRAMS_A_PROCESSOR = 4
MAX_SPLITS = 512
MAX_TERMS = 4096  # that a lane adds up in fp32


def whole_rows(columns: int) -> tuple[int, int, int] | None:
    """(rows a tile, columns a tile, warps) for rows that fit; None for others."""
    block = max(LEAST_COLUMNS, triton.next_power_of_2(columns))
    return None if block > MOST_COLUMNS else (max(1, ELEMENTS // block), block, 4 if block <= ELEMENTS else 8)


# ---- how rows lie ------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """[rows, columns] behind at most two leading strides; see tiles.Matrix."""

    rows: int
    columns: int
    inner: int
    outer_stride: int
    inner_stride: int
    column_stride: int

    def begins_with_vectors(self, width: int) -> bool:
        return self.column_stride == 1 and self.outer_stride % width == self.inner_stride % width == 0

    def begins_like(self, other: "Layout", width: int) -> bool:
        """Whether every row begins as many columns behind a vector's start as the other's, if the first ones do."""
        pair = (self, other)
        return all(layout.column_stride == 1 for layout in pair) and (
            all(layout.begins_with_vectors(width) for layout in pair)
            or len({(m.inner, m.outer_stride % width, m.inner_stride % width) for m in pair}) == 1
        )


@functools.lru_cache(4096)
def layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout | None:
    """None if the leading dimensions need more than two strides."""
    sizes, steps = [], []  # innermost first
    for size, step in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if sizes and step == steps[-1] * sizes[-1]:
            sizes[-1] *= size
        else:
            sizes.append(size)
            steps.append(step)
    if len(sizes) > 2:
        return None
    column_stride = strides[-1] if shape[-1] > 1 else 1
    rows = math.prod(shape[:-1])
    if len(sizes) == 2:
        return Layout(rows, shape[-1], sizes[0], steps[1], steps[0], column_stride)
    return Layout(rows, shape[-1], 1, steps[0] if steps else 0, 0, column_stride)


class Operand(NamedTuple):
    """A tensor as a matrix. Where that takes a copy, `tensor` is the copy."""

    tensor: torch.Tensor
    layout: Layout

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Operand":
        found = layout(tensor.shape, tensor.stride())
        if found is None:
            tensor = tensor.contiguous()
            found = layout(tensor.shape, tensor.stride())
        return cls(tensor, found)

    def head(self, width: int) -> int:
        """Columns between the beginning of a vector and row 0."""
        return self.tensor.data_ptr() // self.tensor.element_size() % width

    def matrix(self, width: int, form: int = COLUMNS.value) -> Matrix:
        head = self.head(width) if form == WINDOW.value else 0
        # A pointer that is a multiple of 16 bytes, as the compiler must see to read vectors.
        start = self.tensor if head == 0 else self.tensor.as_strided((1,), (1,), self.tensor.storage_offset() - head)
        rows, columns, *strides = self.layout
        return Matrix(start, *map(unspecialised, (*strides, head, rows, columns)))


def logits_form(student: Operand, teacher: Operand, vocab_size: int, width: int) -> int:
    if not student.layout.column_stride == teacher.layout.column_stride == 1:
        return STRIDED.value
    heads = {student.head(width), teacher.head(width)}
    inside = all(operand.tensor.storage_offset() >= operand.head(width) for operand in (student, teacher))
    if len(heads) > 1 or not inside or not student.layout.begins_like(teacher.layout, width):
        return COLUMNS.value
    whole = heads == {0} and student.layout.begins_with_vectors(width) and vocab_size % width == 0
    return VECTORS.value if whole else WINDOW.value


def gradient_form(gradient: Operand, student: Operand, form: int, width: int) -> int:
    if gradient.layout.column_stride != 1:
        return STRIDED.value
    like = gradient.head(width) == student.head(width) and gradient.layout.begins_like(student.layout, width)
    if form < WINDOW.value or not like:
        return COLUMNS.value
    return form if gradient.layout.columns % width == 0 else WINDOW.value


def choose_tile(
    student: Operand, teacher: Operand, gradient: Operand | None, vocab_size: int, columns: int
) -> tuple[Tile, int]:
    """(tile, warps) for rows of `columns`, of which vocab_size are read."""
    dtypes = {student.tensor.dtype, teacher.tensor.dtype}
    size = max(dtype.itemsize for dtype in dtypes)
    width, whole = VECTOR_BYTES // size, whole_rows(columns)
    form = logits_form(student, teacher, vocab_size, width)
    while whole and form == WINDOW.value and width > 2:  # whole rows have no window: shorter vectors, if they fit
        width //= 2
        form = logits_form(student, teacher, vocab_size, width)
    out_form = 0 if gradient is None else gradient_form(gradient, student, form, width)
    walking = WALKING_IN_PAIRS if pairs_operations(student.tensor.device) else WALKING
    rows, block, warps = whole or (0, *walking[size])
    axis, lanes = (1, rows) if whole else (int(form >= WINDOW.value), block // width)
    half = torch.float16 in dtypes
    return Tile(rows, block, width, form, out_form, columns > vocab_size, half, axis, lanes), warps


# ---- plans -------------------------------------------------------------------------------------------------------


@functools.cache
def processors(device: torch.device) -> int:
    if INTERPRETED.value:
        return 2
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return properties["multiprocessor_count"]


@functools.cache
def pairs_operations(device: torch.device) -> bool:
    if INTERPRETED.value:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 100


class Plan:
    """One operator's launches on one set of tensors."""

    def __init__(self, rows, operation, gradient=None, *, hard=False, entropy=False, slopes=False, rule=None):
        student, teacher = Operand.of(rows.student_logits), Operand.of(rows.teacher_logits)
        target = None if gradient is None else Operand.of(gradient)
        if target is not None and target.tensor is not gradient:
            raise RuntimeError(f"the gradient needs at most two leading strides, got {gradient.stride()}")
        self.device, self.rows = student.tensor.device, student.layout.rows
        columns = rows.vocab_size if target is None else target.layout.columns
        self.tile, self.warps = choose_tile(student, teacher, target, rows.vocab_size, columns)
        self.recipe = recipe_numbers(rows) if rows.recipe else None
        self.class_bias = None if rows.class_bias is None else rows.class_bias.contiguous()
        width, form, out_form = self.tile.WIDTH, self.tile.FORM, self.tile.GRADIENT_FORM
        rows_a_tile = self.tile.ROWS
        self.splits, tiles_a_split = 1, 0
        if rows.recipe:
            self.warps = max(rows_a_tile, 1) * self.tile.BLOCK // (32 * RECIPE_COLUMNS)
        elif rows_a_tile == 0:
            self.splits, tiles_a_split = share(self.rows, columns + width - 1, self.tile, processors(self.device))
        compiled_for = recipe_features if rows.recipe else features
        self.features = compiled_for(rows, operation, hard, entropy, slopes, rule)
        self.pairs = RowPairs(
            student.matrix(width, form),
            teacher.matrix(width, form),
            None if target is None else target.matrix(width, out_form),
            self.per_row(rows.labels),
            self.per_row(rows.keep),
            self.per_row(rows.temperatures),
            temperatures(rows.temperature, rows.entropy_temperature, 1 if rows.recipe else max(self.features.P, 1)),
            *map(unspecialised, (rows.vocab_size, self.splits, tiles_a_split)),
        )

    def per_row(self, values: torch.Tensor | None) -> PerRow | None:
        """[...] or 0-d values, one a row."""
        if values is None:
            return None
        stride = int(values.dim() > 0 and any(values.stride()))
        values = values.contiguous() if stride else values
        head = values.data_ptr() % VECTOR_BYTES // values.element_size()
        if 0 < head <= values.storage_offset():  # a pointer of another alignment would be compiled for anew
            values = values.as_strided((1,), (1,), values.storage_offset() - head)
        else:
            head = 0
        return PerRow(values, unspecialised(head), unspecialised(stride))

    def new_empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def run(self, kernel, *arguments) -> None:
        programs = self.rows * self.splits if self.tile.ROWS == 0 else triton.cdiv(self.rows, self.tile.ROWS)
        run(kernel, programs, self.warps, self.device, self.pairs, *arguments, self.tile, self.features)

    def run_a_row(self, kernel, *arguments) -> None:
        run(kernel, self.rows, 4, self.device, self.pairs, *arguments, self.tile, self.features)


def share(rows: int, columns: int, tile: Tile, processors: int) -> tuple[int, int]:
    """(programs a row, tiles each of them has): enough to fill the GPU, and lanes that do not add up too much."""
    tiles = triton.cdiv(columns, tile.BLOCK)
    wanted = triton.cdiv(PROGRAMS_A_PROCESSOR * processors, max(rows, 1))
    needed = triton.cdiv(tiles * tile.WIDTH, MAX_TERMS)
    tiles_a_split = triton.cdiv(tiles, min(max(wanted, needed), tiles, MAX_SPLITS))
    return triton.cdiv(tiles, tiles_a_split), tiles_a_split


def features(rows, operation, hard, entropy, slopes, rule) -> Features:
    tau, t = (rows.temperature if rows.temperatures is None else math.nan), rows.entropy_temperature
    ratio = next((r for r in RATIOS if r[0] * tau == r[1] * t), (0, 0))
    if operation == "gradient" or slopes:  # the one has no use for exponentials at both temperatures, the other no form
        ratio = (0, 0)
    where = HARD_AT_TAU if tau == 1 else HARD_AT_T if t == 1 else HARD_OWN
    weighting, tau_squared = (0, False) if rule is None else (rule.weighting, rule.tau_squared)
    return Features(*ratio, where.value if hard else NO_HARD.value, slopes, entropy, weighting, tau_squared)


def columns_of(recipe: ops.Recipe) -> tuple[int, float, float]:
    """Kind and parameters of the divergence that is summed over columns: for a decoupled one, the rest's."""
    if recipe.divergence == divergences.DECOUPLED:
        return divergences.ForwardKL().kernel()
    return recipe[:3]


def recipe_features(rows, operation, hard, entropy, slopes, rule) -> RecipeFeatures:
    recipe = ops.Recipe.of(rows.recipe)
    kind, first, second = columns_of(recipe)
    # What a mixture's weights are makes no other kernel.
    nonzero = (True, True, True) if kind in MIXTURES else (first != 0, second != 0, first + second != 0)
    pulls = operation != "gradient" and (recipe.standardize != 0 or slopes)
    values = operation != "gradient" and (pulls or kind != divergences.ForwardKL.code)
    weighting, tau_squared = (0, False) if rule is None else (rule.weighting, rule.tau_squared)
    return RecipeFeatures(
        kind,
        *nonzero,
        recipe.divergence == divergences.DECOUPLED,
        recipe.standardize,
        recipe.student_cap != 0,
        recipe.teacher_cap != 0,
        rows.class_bias is not None,
        rows.temperatures is not None,
        values,
        pulls,
        slopes,
        (HARD_OWN if hard else NO_HARD).value,
        entropy,
        weighting,
        tau_squared,
    )


def recipe_numbers(rows) -> Recipe:
    recipe = ops.Recipe.of(rows.recipe)
    _, *columns = columns_of(recipe)
    scales_and_caps, taus = recipe[4:8], recipe.temperatures
    k_tau, inverse_tau = (tuple(one / tau for tau in taus) for one in (LOG2_E, 1.0))
    return Recipe(*columns, recipe.first, recipe.second, *scales_and_caps, taus, k_tau, inverse_tau, recipe.factors)


def temperatures(tau: float, t: float, P: int) -> Temperatures:
    return Temperatures(tau, t, LOG2_E / tau, LOG2_E / t, LOG2_E / (P * tau))


def run(kernel, programs: int, warps: int, device: torch.device, *arguments) -> None:
    """Launch on the tensors' device, which need not be the current one."""
    if programs == 0:
        return
    # The interpreter computes with numpy, which warns of infinities that are meant.
    around = np.errstate(all="ignore") if device.type == "cpu" else torch.get_device_module(device).device(device)
    with around:
        # Fused multiply-adds, said aloud because Triton's default is about to change.
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=True)
