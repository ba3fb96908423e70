"""The sweeps of a recipe along rows: one program a row, or several whole rows a program, read once.

What a row is read from is called `data`: a RowWindow that every sweep walks along, or the Columns of whole rows.
"""

import triton
import triton.language as tl

from .recipe import (
    NO_STANDARDIZE,
    Columns,
    add_moments,
    any_side,
    fold_moments,
    no_moments,
    scales,
    shaped,
    side_of,
    standardized,
)
from .recipe_gradient import recipe_gradient
from .recipe_result import LabelColumn, finish_recipe
from .recipe_sums import add_sums, add_values, fold_sums, fold_values, no_sums, no_values, normalisers, sums_at
from .row_state import NO_HARD, over
from .rows import load_pairs, load_per_row, row_window
from .tiles import (
    VECTORS,
    columns_left,
    in_tile,
    load_tile,
    multiple,
    number,
    row_offset,
    row_start,
    store_rows,
    store_tile,
    tile_columns,
)

# ---- reading -----------------------------------------------------------------------------------------------------


@triton.jit
def load_bias(class_bias, at, inside, f: tl.constexpr):
    if f.BIAS:
        return tl.load(class_bias + at, inside, 0.0)
    else:
        return tl.zeros(inside.shape, tl.float32)


@triton.jit
def whole_columns(pairs, recipe, class_bias, row, kept, label, tile: tl.constexpr, f: tl.constexpr):
    columns = tl.arange(0, tile.BLOCK)[None, :]
    y, z = load_pairs(pairs, row, kept, tile)
    return Columns(
        shaped(y, recipe.teacher_scale, recipe.teacher_cap, f.TEACHER_CAP),
        shaped(z, recipe.student_scale, recipe.student_cap, f.STUDENT_CAP),
        load_bias(class_bias, columns, columns < number(pairs.vocab_size), f),
        columns == label[:, None],
    )


@triton.jit
def tile_of(pairs, recipe, class_bias, w, i, label, LAST: tl.constexpr, tile: tl.constexpr, f: tl.constexpr):
    """The i-th tile of a row; LAST as for load_tile."""
    start, columns = tl.cast(i, tl.int64) * tile.BLOCK, tile_columns(tile)
    y = load_tile(pairs.teacher, w.teacher, start, w.head, w.end, columns, -float("inf"), tile, LAST)
    z = load_tile(pairs.student, w.student, start, w.head, w.end, columns, -float("inf"), tile, LAST)
    left = columns_left(w.end, start, tile)
    if tile.FORM == VECTORS:
        inside = columns < multiple(left, tile.WIDTH)
    else:
        inside = (columns >= in_tile(w.head, start, tile)) & (columns < left)
    return Columns(
        shaped(y, recipe.teacher_scale, recipe.teacher_cap, f.TEACHER_CAP),
        shaped(z, recipe.student_scale, recipe.student_cap, f.STUDENT_CAP),
        load_bias(class_bias, start - w.head + columns, inside, f),
        columns == in_tile(label + w.head, start, tile),
    )


@triton.jit
def row_data(pairs, recipe, class_bias, row, kept, label, tile: tl.constexpr, f: tl.constexpr):
    if tile.ROWS > 0:
        return whole_columns(pairs, recipe, class_bias, row, kept, label, tile, f)
    else:
        return row_window(pairs, row, kept, tile)


@triton.jit
def load_label_logit(m, row, label, valid):
    x = tl.load(m.pointer + row_offset(m, row) + label * number(m.column_stride), valid, float("nan"))
    return x.to(tl.float32)


@triton.jit
def load_label_column(pairs, recipe, class_bias, row, kept, f: tl.constexpr):
    """Before any program of the row writes a gradient, which may be over the student's logits."""
    if f.HARD == NO_HARD and not f.DECOUPLED:
        nothing = tl.zeros(kept.shape, tl.float32)
        return LabelColumn(tl.full(kept.shape, -1, tl.int64), nothing, nothing, nothing)
    else:
        label = load_per_row(pairs.labels, row, kept, -1)
        valid = (label >= 0) & (label < number(pairs.vocab_size))
        z = shaped(
            load_label_logit(pairs.student, row, label, valid),
            recipe.student_scale,
            recipe.student_cap,
            f.STUDENT_CAP,
        )
        y, bias = z, tl.zeros_like(z)
        if f.DECOUPLED:
            y = shaped(
                load_label_logit(pairs.teacher, row, label, valid),
                recipe.teacher_scale,
                recipe.teacher_cap,
                f.TEACHER_CAP,
            )
            bias = load_bias(class_bias, label, valid, f)
        return LabelColumn(tl.where(valid, label, -1), y, z, bias)


@triton.jit
def given_temperature(pairs, row, kept, f: tl.constexpr):
    """The row's entry of a tensor of temperatures; without one, nothing that is looked at."""
    if f.GIVEN:
        return load_per_row(pairs.temperatures, row, kept, 1.0).to(tl.float32)
    else:
        return tl.cast(1.0, tl.float32)


# ---- sweeps ------------------------------------------------------------------------------------------------------


@triton.jit
def tiles_of(w, tile: tl.constexpr):
    return tl.cdiv(w.end, tile.BLOCK)


@triton.jit
def row_scales(pairs, recipe, class_bias, data, row, kept, tile: tl.constexpr, f: tl.constexpr):
    """The row's scales; a sweep of moments where logits are standardised."""
    given = given_temperature(pairs, row, kept, f)
    if f.STANDARDIZE == NO_STANDARDIZE:
        return scales(recipe, pairs.temperature, given, any_side(), any_side(), f)
    else:
        if tile.ROWS > 0:
            nothing = no_moments(tile.ROWS)
            teacher, student = add_moments(nothing, data.y, 1), add_moments(nothing, data.z, 1)
        else:
            teacher, student = no_moments(tile.LANES), no_moments(tile.LANES)
            for i in range(0, tiles_of(data, tile)):
                c = tile_of(pairs, recipe, class_bias, data, i, tl.cast(-1, tl.int64), False, tile, f)
                teacher, student = add_moments(teacher, c.y, tile.AXIS), add_moments(student, c.z, tile.AXIS)
            teacher, student = fold_moments(teacher), fold_moments(student)
        return scales(recipe, pairs.temperature, given, side_of(teacher), side_of(student), f)


@triton.jit
def saved_scales(pairs, recipe, saved, row, kept, f: tl.constexpr):
    """The same out of what the statistics saved, but for the teacher's mean, which a gradient has no use for."""
    teacher, student = any_side(), any_side()
    if f.STANDARDIZE != NO_STANDARDIZE:
        teacher = standardized(saved.student_count, saved.student_mean, saved.teacher_deviation)
        student = standardized(saved.student_count, saved.student_mean, saved.student_deviation)
    return scales(recipe, pairs.temperature, given_temperature(pairs, row, kept, f), teacher, student, f)


@triton.jit
def row_sums(pairs, recipe, class_bias, data, label, k, tile: tl.constexpr, f: tl.constexpr):
    if tile.ROWS > 0:
        return add_sums(no_sums(tile.ROWS, k), data, k, 1, f)
    else:
        s = no_sums(tile.LANES, k)
        for i in range(0, tiles_of(data, tile)):
            c = tile_of(pairs, recipe, class_bias, data, i, label.column, False, tile, f)
            s = add_sums(s, c, k, tile.AXIS, f)
        return fold_sums(s, k, f)


@triton.jit
def row_values(pairs, recipe, class_bias, data, label, s, k, tile: tl.constexpr, f: tl.constexpr):
    """Zeros where no value needs the sweep."""
    n = ()
    for i in tl.static_range(len(k.tau)):
        one = sums_at(s.tau, i)
        n += (normalisers(one.B0, one.D0),)
    if tile.ROWS > 0:
        values = no_values(tile.ROWS, k)
        if f.VALUES:
            values = add_values(values, data, s.rest_My, s.rest_Mz, n, k, recipe, 1, f)
        return values
    else:
        values = no_values(tile.LANES, k)
        if f.VALUES:
            for i in range(0, tiles_of(data, tile)):
                c = tile_of(pairs, recipe, class_bias, data, i, label.column, False, tile, f)
                values = add_values(values, c, s.rest_My, s.rest_Mz, n, k, recipe, tile.AXIS, f)
        return fold_values(values)


@triton.jit
def write_recipe(pairs, recipe, class_bias, data, row, kept, basis, k, label, tile: tl.constexpr, f: tl.constexpr):
    """The gradient, last tile first; exactly 0 in rows left out and past the vocabulary."""
    if tile.ROWS > 0:
        g = tl.where(over(kept, 1), recipe_gradient(data, basis, k, recipe, 1, f), 0.0)
        if tile.WIDER:
            g = tl.where(tl.arange(0, tile.BLOCK)[None, :] < number(pairs.vocab_size), g, 0.0)
        store_rows(pairs.gradient, row, g, tile)
    else:
        columns, gradient = tile_columns(tile), pairs.gradient
        pointer = row_start(gradient, row, data.head, tile.WIDTH, tile.GRADIENT_FORM)
        end = data.head + number(gradient.columns)
        tiles = tl.cdiv(end, tile.BLOCK)
        for i in range(0, tiles):
            at = tiles - 1 - i
            start = tl.cast(at, tl.int64) * tile.BLOCK
            c = tile_of(pairs, recipe, class_bias, data, at, label.column, True, tile, f)
            g = tl.where(kept, recipe_gradient(c, basis, k, recipe, tile.AXIS, f), 0.0)
            if tile.WIDER:
                g = tl.where(columns < columns_left(data.end, start, tile), g, 0.0)
            store_tile(gradient, pointer, start, data.head, end, columns, g, tile)


# ---- a row from its data to its result ---------------------------------------------------------------------------


@triton.jit
def finish_row(pairs, recipe, class_bias, row, kept, tile: tl.constexpr, f: tl.constexpr):
    """(data, label, scales, result) of a row after all sweeps but the gradient's."""
    label = load_label_column(pairs, recipe, class_bias, row, kept, f)
    data = row_data(pairs, recipe, class_bias, row, kept, label.column, tile, f)
    k = row_scales(pairs, recipe, class_bias, data, row, kept, tile, f)
    s = row_sums(pairs, recipe, class_bias, data, label, k, tile, f)
    values = row_values(pairs, recipe, class_bias, data, label, s, k, tile, f)
    return data, label, k, finish_recipe(s, values, label, k, recipe, f)
