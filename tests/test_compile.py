"""The Triton kernels compile for a GPU, without one.

The compiler refuses what the interpreter lets pass: a name that changes its type in a branch, for example."""

import os
import subprocess
import sys

import pytest
import torch

from grpo_kernels.nf4.linear import triton

pytestmark = [
    pytest.mark.skipif(triton is None, reason="no Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels"),
]

PROGRAM = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from grpo_kernels import linear_logprob, rope, swiglu, token_logprob
from grpo_kernels.nf4.dequantize import _dequantize_kernel
from grpo_kernels.nf4.few_rows import _few_rows_kernel
from grpo_kernels.nf4.prologue import prologue_kernel
from grpo_kernels.nf4.scaled import _scaled_kernel
from grpo_kernels.nf4.tiles import choose_tiles

def compile(kernel, types, warps, stages=3, registers=None, **constants):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"}
    sizes = ("N", "K", "columns", "row_stride")
    even = [name for name, kind in signature.items() if kind.startswith("*") or name in sizes]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}  # as in real launches
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled

def types(pointers, integers, floats):
    kinds = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items() if kind}
    return kinds | dict.fromkeys(integers.split(), "i32") | dict.fromkeys(floats.split(), "fp32")

for operand, bias, softcap in (("bf16", None, None), ("fp16", "fp16", 30.0)):
    pointers = {"logits": "fp32", "operand": operand, "bias": bias, "targets": "i64"}
    integers = "logits_stride operand_stride state_stride data_stride start width hidden_size"
    for kernel, accumulator in (
        (linear_logprob._softmax_step_kernel, "fp32"),
        (linear_logprob._sums_step_kernel, None),
        (linear_logprob._gradient_step_kernel, None),
    ):
        all_pointers = pointers | {"state": "fp32", "data": "fp32", "accumulator": accumulator}
        known = types(all_pointers, integers, "scale half_range")
        compile(kernel, known, 4, SOFTCAP=softcap, BLOCK=2048)

for dtype in ("bf16", "fp16"):
    pointers = dict.fromkeys("grad gate up out grad_gate grad_up".split(), dtype)
    known = types({"logits": dtype, "tokens": "i64", "out": "fp32"}, "stride token_stride vocabulary", "")
    compile(token_logprob._token_logprob_kernel, known, token_logprob.WARPS, BLOCK=token_logprob.BLOCK)
    integers = "grad_stride gate_stride up_stride grad_gate_stride grad_up_stride columns"
    forward, backward = swiglu._forward_kernel, swiglu._backward_kernel
    for kernel, without in ((forward, ""), (backward, ""), (backward, "out")):
        compile(kernel, types(pointers | {without: None}, integers, ""), 4, BLOCK=swiglu.BLOCK)

strides = [f"{name}_stride" for name in "q_batch q_time q_head k_batch k_time k_head table_batch table_time".split()]
for (dtype, half, rest), backward in itertools.product((("bf16", 64, 0), ("fp16", 48, 32), ("fp32", 48, 32)), (0, 1)):
    known = types(dict.fromkeys("q k cos sin q_out k_out".split(), dtype), "tokens time q_programs", "")
    sizes = {"DIM": 128, "HALF": half, "HALF_TILE": 64, "REST_TILE": rest, "ROWS": rope.PAIRS // 64}
    choices = {"Q_HEADS": 24, "K_HEADS": 8, "BACKWARD": bool(backward)}
    compile(rope._rope_kernel, known | dict.fromkeys(strides, "i32"), 4, **sizes, **choices)

# The tiles that nf4_linear chooses: with and without a split sum, with and without an adapter.
chosen = {}
for rows, n in itertools.product((32, 64, 128, 256), (1024, 4096, 2**17)):
    tiles = choose_tiles(rows, n, 4096, 132)
    chosen[tiles._replace(splits=min(tiles.splits, 2))] = None
assert len(chosen) == 9 and {tiles.splits for tiles in chosen} == {1, 2}
for tiles, adapter in itertools.product(chosen, (False, True)):
    split = tiles.splits > 1
    rank = (16 if split else 64) if adapter else None
    pointers = {"packed": "u8", "absmax": "u8", "row_scale": "fp32", "y": "bf16", "table": "i32"}
    pointers |= dict.fromkeys(("code", "outer", "offset"), "fp32")
    pointers |= {"partial": "fp32", "counters": "i32"} if split else {}
    choices = {"N_TILE": tiles.n, "ROW_TILE": tiles.rows, "SPLIT": split, "PDL": True, "INTERPRET": False}
    integers = "offset_stride rows N K row_tiles"
    if rank:
        pointers |= {"b": "bf16", "shrunk": "bf16"}
        integers += " slices first_end second_end"
        choices |= {"RANK": rank, "RANK_TILE": rank}
    known = types(pointers, integers, "factor") | {"x_desc": f"tensordesc<fp16[{tiles.rows}, 64]>"}
    compiled = compile(_scaled_kernel, known, tiles.warps, tiles.stages, tiles.registers, **choices)
    assert compiled.metadata.shared <= 227 * 1024, tiles  # what a program may have on Hopper
    # Nothing but the TMA's copies goes through shared memory within the loop, and they come ahead.
    loop = next(part for part in compiled.asm["ttgir"].split("scf.for")[1:] if "warp_group_dot" in part)
    loop = loop[: loop.index("scf.yield")]
    assert loop.count("ttng.warp_group_dot ") == 2 and loop.count("ttng.async_tma_copy_global_to_local") == 2
    assert loop.count("ttng.wait_barrier") == 1
    for slow in ("convert_layout", "local_load", "local_store", "local_alloc", "tt.load"):
        assert slow not in loop, (tiles, slow)

def compile_few_rows(rows, n, nested, dtype, rank, gated):
    tiles = choose_tiles(rows, n, 4096, 132)
    pointers = {"x": dtype, "packed": "i16", "absmax": "u8" if nested else "fp32", "y": dtype, "table": "i32"}
    pointers |= dict.fromkeys(("code", "outer", "offset"), "fp32") if nested else {"bias": dtype}
    pointers |= {"b": dtype, "shrunk": dtype} if rank else {}
    integers = "offset_stride rows row_stride N K"
    integers += " slices first_end second_end" if rank else ""
    choices = {"NESTED": nested, "WARPS": tiles.warps, "COLUMNS": tiles.rows // 8, "PDL": True, "INTERPRET": False}
    choices |= {"GATED": gated} | ({"RANK": rank, "RANK_TILE": max(rank, 16)} if rank else {})
    if rank:  # and the next product's weight is known
        pointers |= {"next": "u8"}
        integers += " next_bytes first_prefetcher"
    known = types(pointers, integers, "factor")
    compile(_few_rows_kernel, known, tiles.warps, 1, tiles.registers, **choices)
    return tiles

few = {compile_few_rows(8, 1024, True, "bf16", 16, False), compile_few_rows(8, 2**17, False, "fp16", None, True)}
few |= {compile_few_rows(16, 1024, False, "bf16", 64, True), compile_few_rows(16, 2**17, True, "fp16", 8, False)}
assert len(few) == 4

adapters = ((None, None, False), (12, 16, True), (16, 32, True), (32, 32, True), (64, 16, False))
for scaled, gated, (rank, height, shared) in itertools.product((True, False), (False, True), adapters):
    if not scaled and (gated or not rank):
        continue  # nothing to do for few rows
    pointers = {"x": "bf16"} | ({"out": "fp16", "row_scale": "fp32", "counters": "i32"} if scaled else {})
    x_rows, width, warps = (1, 16384, 16) if scaled else (2, 4096, 4)
    integers, choices = "row_stride rows columns counters", {"stride": 1, "X_ROWS": x_rows, "WIDTH": width}
    integers += " up_offset" * gated
    if rank:
        pointers |= {"a": "bf16", "shrunk": "bf16"} | ({"parts": "fp32", "shrink_counters": "i32"} if shared else {})
        integers += " shrink_programs shrunk_rows slices blocks_per_program splits"
        choices |= {"RANK": rank, "RANK_TILE": max(rank, 16), "SHRINK_ROWS": height}
    known = types(pointers, integers, "")
    compiled = compile(prologue_kernel, known, warps, PDL=True, **choices)
    assert compiled.metadata.shared <= 48 * 1024, rank  # several programs a multiprocessor
pointers = {"packed": "i16", "absmax": "u8", "code": "fp32", "outer": "fp32", "offset": "fp32", "out": "bf16"}
known = types(pointers, "offset_stride blocks width row_width row_start start", "")
compile(_dequantize_kernel, known, 4, NESTED=True, BLOCKS=32)
"""


def test_kernels_compile_for_hopper(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
