"""Bugs to put into copies of csrc, and what must find each."""

from dataclasses import dataclass

# What the driver says of a case that fails.
WRONG = r"FAILED .* is \S+, not "
FOREIGN = r"FAILED .* memory between rows changed"
NOTHING_WRITTEN = r"FAILED .* gradient of row \d+ column \d+ is -?nan"
RACE = r"WARNING: ThreadSanitizer: data race"


@dataclass(frozen=True)
class Mutant:
    """`old`, which `file` has once, becomes `new`. `found`: what a kind of build says of it in a group of cases."""

    file: str
    old: str
    new: str
    group: str
    found: dict


MUTANTS = {
    # Which columns are whose.
    "vector_tail_too_long": Mutant(
        "cuda/columns.cuh",
        "vectors = (job.vocab_size - head) / W;",
        "vectors = (job.vocab_size - head + W - 1) / W;",
        "stream",
        {"plain": f"{FOREIGN}|{WRONG}", "asan": "heap-buffer-overflow|use-after-poison"},
    ),
    "head_columns_skipped": Mutant(
        "cuda/columns.cuh",
        "const int column = i < head ? i : i + vectors * W;",
        "const int column = i + head + vectors * W;",
        "resident",
        {"plain": WRONG},
    ),
    "loose_columns_of_one_end": Mutant(
        "cuda/columns.cuh",
        "return column < job.vocab_size && i < 2 * W ? column : -1;",
        "return column < job.vocab_size && i < W ? column : -1;",
        "ring",
        {"plain": WRONG},
    ),
    "label_one_off": Mutant(
        "cuda/row_result.cuh",
        "const int at = label - row.column(vector);",
        "const int at = label - row.column(vector) + 1;",
        "resident",
        {"plain": r"FAILED .* gradient of row \d+ column \d+ is \S+, not "},
    ),
    "label_outside_of_vectors_skipped": Mutant(
        "cuda/row_result.cuh",
        "out.store_column(i, i == label ? g + basis.label : g);",
        "out.store_column(i, g);",
        "two_pass",
        {"plain": r"FAILED .* gradient of row \d+ column \d+ is \S+, not "},
    ),
    "row_left_out_not_zeroed": Mutant(
        "cuda/columns.cuh",
        "      store_vector(v, zeros);\n",
        "      ;\n",
        "ring",
        {"plain": NOTHING_WRITTEN},
    ),
    "loose_columns_of_row_left_out_not_zeroed": Mutant(
        "cuda/columns.cuh",
        "    if (loose >= 0) store_column(loose, 0.f);\n",
        "",
        "stream",
        {"plain": NOTHING_WRITTEN},
    ),
    "columns_past_vocabulary_not_zeroed": Mutant(
        "cuda/columns.cuh", "      store_column(i, 0.f);\n", "      ;\n", "small", {"plain": NOTHING_WRITTEN}
    ),
    "last_stretch_of_row_skipped": Mutant(
        "cuda/shapes.h",
        "(columns + stretch - 1) / stretch",
        "columns / stretch",
        "long",
        {"plain": NOTHING_WRITTEN},
    ),
    "gradient_vectors_where_unlike": Mutant(
        "cuda/columns.cuh",
        "if (W > 1 && (VECTORS || row.job.gradient_vectors)) {",
        "if (W > 1) {",
        "stream",
        {"plain": "misaligned address"},
    ),
    "row_that_is_none": Mutant(
        "cuda/small_rows.cuh",
        "kept = inside && job.keep.at(r, true)",
        "kept = job.keep.at(r, true)",
        "small",
        {"asan": "heap-buffer-overflow"},
    ),
    # Sums and their merging.
    "cross_term_without_student": Mutant(
        "row_state.h",
        "factor.b * (Bd + (by.b - by.d) * B0);",
        "factor.b * (Bd + by.b * B0);",
        "resident",
        {"plain": r"FAILED .* divergence of row \d+ is"},
    ),
    "cross_term_after_teacher_sum": Mutant(
        "row_state.h",
        """\
    Bd = vanished ? factor.b * B0 : factor.b * (Bd + (by.b - by.d) * B0);
    B1 = factor.b * (B1 + by.b * B0), B0 *= factor.b;
""",
        """\
    B1 = factor.b * (B1 + by.b * B0), B0 *= factor.b;
    Bd = vanished ? factor.b * B0 : factor.b * (Bd + (by.b - by.d) * B0);
""",
        "stream",
        {"plain": r"FAILED .* divergence of row \d+ is"},
    ),
    "slope_term_after_first_moment": Mutant(
        "row_state.h",
        "(Bbd + by.b * Bd + (by.b - by.d) * (B1 + by.b * B0))",
        "(Bbd + by.b * Bd + (by.b - by.d) * B1)",
        "two_pass",
        {"plain": r"FAILED .* slope of the divergence of row \d+ is"},
    ),
    "centre_moves_without_sums": Mutant(
        "cuda/row_sums.cuh",
        "      shift({ca - old.a, ce - old.e, cb - old.b, cd - old.d, ch - old.hard});\n",
        "",
        "stream",
        {"plain": WRONG},
    ),
    "nothing_recentred_on_nothing": Mutant(
        "row_state.h",
        "My == T(-INFINITY) ? T(0) : My - my",
        "My - my",
        "stream",
        {"plain": r"FAILED .* of row 6 is -?nan"},
    ),
    "lanes_of_slopes_cut_short": Mutant(
        "cuda/merge.cuh",
        "lane % 4 == 0 && lane < 12",
        "lane % 4 == 0 && lane < 8",
        "two_pass",
        {"plain": r"FAILED .* slope of the divergence of row \d+ is"},
    ),
    "infinities_meet_zeros": Mutant(
        "cuda/row_sums.cuh",
        "if (eb > 0) s.Bd = fmaf(eb, b - d, s.Bd);",
        "s.Bd = fmaf(eb, b - d, s.Bd);",
        "ring",
        {"plain": r"FAILED .* divergence of row \d+ is -?nan"},
    ),
    "one_state_too_many": Mutant(
        "cuda/merge.cuh",
        "if (lane < warps) merged = load_state(space.warps[lane]);",
        "if (lane <= warps) merged = load_state(space.warps[lane]);",
        "resident",
        {"plain": WRONG},
    ),
    "parts_replace_each_other": Mutant(
        "cuda/stream_rows.cuh", "      total.merge(s, k);\n", "      total = s;\n", "long", {"plain": WRONG}
    ),
    # Threads that do not wait for each other.
    "merge_without_barrier": Mutant(
        "cuda/merge.cuh",
        "  store_warp_state(space.warps[warp], s, slopes);\n  __syncthreads();\n",
        "  store_warp_state(space.warps[warp], s, slopes);\n",
        "resident",
        {"plain": WRONG, "tsan": RACE},
    ),
    "basis_without_barrier_resident": Mutant(
        "cuda/resident_rows.cuh",
        "      if (threadIdx.x == 0) space.basis = basis;\n    }\n    __syncthreads();\n",
        "      if (threadIdx.x == 0) space.basis = basis;\n    }\n",
        "resident",
        {"plain": WRONG, "tsan": RACE},
    ),
    "basis_without_barrier_ring": Mutant(
        "cuda/ring_rows.cuh",
        "        if (threadIdx.x == 0) space.merge.basis = basis;\n      }\n      __syncthreads();\n",
        "        if (threadIdx.x == 0) space.merge.basis = basis;\n      }\n",
        "ring",
        {"plain": WRONG},
    ),
    "basis_without_barrier_stream": Mutant(
        "cuda/stream_rows.cuh",
        "      if (threadIdx.x == 0) space.basis = basis;\n    }\n    __syncthreads();\n",
        "      if (threadIdx.x == 0) space.basis = basis;\n    }\n",
        "stream",
        {"plain": WRONG},
    ),
    "total_without_barrier": Mutant(
        "cuda/row_gradient.cuh",
        "    __syncthreads();\n    if (threadIdx.x < half)",
        "    if (threadIdx.x < half)",
        "total",
        {"plain": WRONG},
    ),
    "label_read_after_merge": Mutant(
        "cuda/stream_rows.cuh",
        "finish_row(job, r, merged, k, label_logit, thread == 0)",
        "finish_row(job, r, merged, k, job.hard != kNoHardSum ? row.label_logit() : 0.f, thread == 0)",
        "stream",
        {"tsan": RACE},
    ),
    # CTAs of a cluster that do not.
    "cluster_left_early": Mutant(
        "cuda/merge.cuh",
        "  if (cluster > 1) meet_cluster();\n",
        "",
        "stream",
        {"plain": r"FAILED .* CTA \d+ of (a|the) cluster (may exit before|has exited)"},
    ),
    "merge_without_cluster_barrier": Mutant(
        "cuda/merge.cuh",
        "  if (cluster > 1) {\n    meet_cluster();\n",
        "  if (cluster > 1) {\n",
        "ring",
        {"plain": "FAILED .* has not waited for its cluster"},
    ),
    "no_turns_resident": Mutant(
        "cuda/resident_rows.cuh", "    turn ^= 1;\n", "", "resident", {"plain": WRONG, "tsan": RACE}
    ),
    "no_turns_ring": Mutant("cuda/ring_rows.cuh", "      turn ^= 1;\n", "", "ring", {"tsan": RACE}),
    "no_turns_stream": Mutant("cuda/stream_rows.cuh", "    turn ^= 1;\n", "", "stream", {"tsan": RACE}),
    "every_cta_is_the_first": Mutant(
        "cuda/merge.cuh",
        "(cluster > 1 ? ptx::cluster_rank() * blockDim.x : 0) + threadIdx.x",
        "threadIdx.x",
        "resident",
        {"plain": WRONG},
    ),
    "slice_up_to_the_end": Mutant(
        "cuda/ring_rows.cuh",
        "end = min(first + vectors, row.vectors);\n    return {first",
        "end = row.vectors;\n    return {first",
        "ring",
        {"plain": WRONG},
    ),
    # Copies.
    "copy_not_awaited": Mutant(
        "cuda/ring_rows.cuh",
        "    ptx::barrier_wait(&space.full[stage], parity);\n",
        "",
        "ring",
        {"plain": "FAILED .*(nothing has waited for|nan)", "asan": "use-after-poison"},
    ),
    "stage_refilled_while_read": Mutant(
        "cuda/ring_rows.cuh",
        "    __syncthreads();  // nobody reads this stage any more\n",
        "",
        "ring",
        {"plain": "FAILED .* deadlock", "tsan": RACE},
    ),
    "parity_stays": Mutant(
        "cuda/ring_rows.cuh",
        "if (++stage == stages) stage = 0, parity ^= 1;",
        "if (++stage == stages) stage = 0;",
        "ring",
        {"plain": "FAILED .*CUDA emulator"},
    ),
    "row_ahead_is_the_next": Mutant(
        "cuda/ring_rows.cuh",
        "ring.fill(job, r + stages * step, rank, stage);",
        "ring.fill(job, r + step, rank, stage);",
        "ring",
        {"plain": "FAILED .* exits while a bulk_copy that nothing has waited for"},
    ),
    "stages_overlap": Mutant(
        "cuda/ring_rows.cuh",
        "vectors * W * (sizeof(S) + sizeof(T)));",
        "vectors * W * sizeof(S));",
        "ring",
        {"plain": "FAILED .* another copy is still on its way"},
    ),
    "half_of_the_bytes_expected": Mutant(
        "cuda/ring_rows.cuh",
        "ptx::barrier_expect_bytes(&full[stage], columns * (sizeof(S) + sizeof(T)));",
        "ptx::barrier_expect_bytes(&full[stage], columns * sizeof(S));",
        "ring",
        {"plain": r"expects \d+ bytes, was given copies of \d+"},
    ),
    "barriers_without_fence": Mutant(
        "cuda/ring_rows.cuh",
        "    ptx::barrier_init_fence();\n",
        "",
        "ring",
        {"plain": "FAILED .* no barrier_init_fence"},
    ),
    "barriers_not_awaited": Mutant(
        "cuda/ring_rows.cuh",
        "  __syncthreads();\n  int stage = 0,",
        "  int stage = 0,",
        "ring",
        {"plain": "FAILED .* not initialised"},
    ),
    "label_read_late": Mutant(
        "cuda/small_rows.cuh",
        "  __syncwarp();  // all lanes have read the label's logit, and the gradient may be written over it\n",
        "",
        "small",
        {"tsan": RACE},
    ),
    # Recipes.
    "columns_that_are_none": Mutant(
        "cuda/recipe_columns.cuh",
        "if (column >= row.job.vocab_size) break;",
        "if (column > row.job.vocab_size) break;",
        "recipe",
        {"plain": WRONG},
    ),
    "slots_of_both_sides_overlap": Mutant(
        "cuda/recipe_columns.cuh",
        "stage_ + sizeof(word<S>) * slots_ * blockDim.x",
        "stage_ + sizeof(word<S>) * (slots_ - 1) * blockDim.x",
        "recipe",
        {"plain": WRONG},
    ),
    "loose_column_skipped": Mutant(
        "cuda/recipe_rows.cuh",
        "for (int n = begin == 0 && columns.loose >= 0 ? kLoose : begin; n < last; ++n)",
        "for (int n = begin; n < last; ++n)",
        "recipe",
        {"plain": WRONG},
    ),
    "label_among_the_rest": Mutant(
        "cuda/recipe_rows.cuh",
        "left_out(job.recipe.decoupled() ? label_column : -1)",
        "left_out(-1)",
        "recipe",
        {"plain": WRONG},
    ),
    "sums_replace_each_other": Mutant(
        "cuda/recipe_rows.cuh", "first ? sum : total + sum", "sum", "recipe", {"plain": WRONG}
    ),
    "warps_without_barrier": Mutant(
        "cuda/recipe_rows.cuh",
        "  __syncthreads();\n  for (int i = threadIdx.x; i < count; i += blockDim.x) {\n    float x =",
        "  for (int i = threadIdx.x; i < count; i += blockDim.x) {\n    float x =",
        "recipe",
        {"plain": WRONG, "tsan": RACE},
    ),
    "cluster_of_recipe_not_awaited": Mutant(
        "cuda/recipe_rows.cuh",
        "  if (cluster > 1) {\n    meet_cluster();\n",
        "  if (cluster > 1) {\n",
        "recipe",
        {"plain": "FAILED .* has not waited for its cluster"},
    ),
    "no_turns_recipe": Mutant("cuda/recipe_rows.cuh", "    turn ^= 1;\n", "", "recipe", {"tsan": RACE}),
    "scales_without_barrier": Mutant(
        "cuda/recipe_rows.cuh",
        "    store_scales(space.teacher.deviation(), space.student.deviation());\n    __syncthreads();\n",
        "    store_scales(space.teacher.deviation(), space.student.deviation());\n",
        "recipe",
        {"plain": WRONG, "tsan": RACE},
    ),
    "basis_without_barrier_recipe": Mutant(
        "cuda/recipe_rows.cuh",
        "      way.finish();\n    __syncthreads();\n",
        "      way.finish();\n",
        "recipe",
        {"plain": WRONG, "tsan": RACE},
    ),
    "next_row_too_early": Mutant(
        "cuda/recipe_rows.cuh",
        "    __syncthreads();  // what it needed, the next row may overwrite\n",
        "",
        "recipe",
        {"tsan": RACE},
    ),
    "label_read_while_written": Mutant(
        "cuda/recipe_rows.cuh",
        "    if (cluster > 1) meet_cluster();  // all CTAs have read the label's logit\n",
        "",
        "recipe",
        {"tsan": RACE},
    ),
}
