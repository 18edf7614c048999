"""The end of a program of `nf4_scaled`: from its sums over k to a tile of y."""

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS
    triton = None

if triton is not None:
    from grpo_kernels.nf4.prologue import adapter_operands, add_product, power_of_two

    @triton.jit
    def epilogue(
        accumulator, tile, n_start, n, row, rows, N, factor, exponent, row_scale_ptr, bias_ptr, y_ptr, partial_ptr,
        counters_ptr, b_ptr, shrunk_ptr, slices, first_end, second_end,
        SPLIT: tl.constexpr, INTERPRET: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr,
    ):  # fmt: skip
        """Add up the sums of the programs that share a tile, undo all scaling, add bias and adapter, store the tile.

        accumulator: [N_TILE, ROW_TILE] float32, the program's own sums, for the rows n of W and the rows row of x. If
        SPLIT, each program leaves its sums in partial_ptr, and the last one to come, found by a counter, does the rest;
        it adds the sums in order, so the result is deterministic. The scaling to undo is factor, the scale of each row
        of x, and 2^(exponent - 14) of each row of W."""
        N_TILE: tl.constexpr = accumulator.shape[0]
        ROW_TILE: tl.constexpr = accumulator.shape[1]
        last_one = True
        SUMS: tl.constexpr = min(8, max(1, 128 // ROW_TILE)) if N_TILE <= 64 else 1
        if SPLIT:
            local = tl.arange(0, N_TILE)[:, None] * ROW_TILE + tl.arange(0, ROW_TILE)[None, :]
            partials = partial_ptr + tile.to(tl.int64) * (N_TILE * ROW_TILE) + local
            step = tl.num_programs(0).to(tl.int64) * (N_TILE * ROW_TILE)
            tl.store(partials + tl.program_id(1) * step, accumulator)
        if b_ptr is not None:  # these loads are under way while the tile is written and counted
            # More ranks at a time would spill registers.
            PART: tl.constexpr = min(RANK_TILE, max(16, 2**18 // (N_TILE * ROW_TILE)))
            b, s = adapter_operands(
                b_ptr, shrunk_ptr, slices, first_end, second_end, n_start, n, row, 0, RANK, RANK_TILE, PART
            )  # fmt: skip
        if SPLIT:
            tl.debug_barrier()  # the whole tile must be written before the counter says so
            splits = tl.num_programs(1)
            last_one = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == splits - 1
            if last_one:
                accumulator = tl.zeros((N_TILE, ROW_TILE), tl.float32)
                for i in range(0, splits, SUMS):
                    for j in tl.static_range(SUMS):
                        inside = i + j < splits
                        accumulator += tl.load(partials + (i + j) * step, mask=inside, other=0.0, cache_modifier=".cg")
        if last_one:
            y = accumulator * factor
            y = y * tl.load(row_scale_ptr + row)[None, :] * power_of_two(exponent - 14)[:, None]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
            if b_ptr is not None:
                # Round here, because the trainer rounds the base product before it adds the adapter's.
                y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
                y = add_product(y, b, s, INTERPRET)
                for low in tl.static_range(PART, RANK_TILE, PART):
                    b, s = adapter_operands(
                        b_ptr, shrunk_ptr, slices, first_end, second_end, n_start, n, row, low, RANK, RANK_TILE, PART
                    )  # fmt: skip
                    y = add_product(y, b, s, INTERPRET)
            column = n_start + tl.arange(0, N_TILE)
            inside = (row < rows)[None, :] & (column < N)[:, None]
            tl.store(y_ptr + row.to(tl.int64)[None, :] * N + column[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)
