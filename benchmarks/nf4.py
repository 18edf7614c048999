"""NF4 matrix products of a whole model: ours, bitsandbytes' and bf16 ones, side by side, with their errors.

    python benchmarks/nf4.py                    # Llama 3.1 8B: 224 products, 1 to 2048 rows
    python benchmarks/nf4.py --check            # errors against float64 for the shapes of 1.5B to 70B models
    python benchmarks/nf4.py --tune --rows 16   # tile sizes of the fused kernel, each shape alone
    python benchmarks/nf4.py --chunks           # chunk sizes of the path for many rows

A measurement is a CUDA graph of the linear layers of all the model's layers, each with its own weights (3.5 GB in all,
so that the L2 cache serves none of them), replayed; the median is reported. Scales are double-quantised. GB/s counts
the codes and scales (bf16: the weights), each once.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import grpo_kernels.nf4_linear as nf4

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

# Linear layers of one decoder layer as (N, K): q, k, v, o, gate, up, down.
MODELS = {
    "llama-3.1-8b": ([(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), *[(14336, 4096)] * 2, (4096, 14336)], 32),
    "qwen-2.5-1.5b": ([(1536, 1536), (256, 1536), (256, 1536), (1536, 1536), *[(8960, 1536)] * 2, (1536, 8960)], 28),
    "qwen-2.5-7b": ([(3584, 3584), (512, 3584), (512, 3584), (3584, 3584), *[(18944, 3584)] * 2, (3584, 18944)], 28),
    "phi-4": ([(7680, 5120), (5120, 5120), (35840, 5120), (5120, 17920)], 40),
    "llama-3.1-70b": (
        [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), *[(28672, 8192)] * 2, (8192, 28672)],
        80,
    ),
}


@dataclass
class Args:
    model: str = "llama-3.1-8b"
    """whose linear layers: llama-3.1-8b (also Mistral 7B's), qwen-2.5-1.5b, qwen-2.5-7b, phi-4, llama-3.1-70b"""
    layers: int | None = None
    """fewer layers than the model has"""
    rows: list[int] = field(default_factory=lambda: [1, 8, 16, 32, 64, 128, 256, 512, 2048])
    """rows of x"""
    check: bool = False
    """errors of every model's shapes instead"""
    tune: bool = False
    """times of many tile sizes instead"""
    chunks: bool = False
    """times of chunk sizes instead"""
    expanded: bool = False
    """scales expanded to float32 for ours, instead of double-quantised"""
    replays: int = 20
    """replays of each graph"""
    best: int = 6
    """tile sizes that --tune prints"""
    compile: str = ""
    """internal: indices of the tiles that this process compiles for --tune"""


@dataclass
class Weight:
    shape: tuple[int, int]
    packed: Tensor
    absmax: nf4.NestedAbsmax | Tensor

    def bytes(self) -> int:
        nested = isinstance(self.absmax, nf4.NestedAbsmax)
        return self.packed.numel() + (self.absmax.quantised.numel() if nested else 4 * self.absmax.numel())

    def state(self):
        """As bitsandbytes' QuantState."""
        a = self.absmax
        outer = bnb.functional.QuantState(absmax=a.absmax, code=a.code, blocksize=256, dtype=torch.float32)
        return bnb.functional.QuantState(
            absmax=a.quantised, shape=torch.Size(self.shape), code=bnb.functional.get_4bit_type("nf4", device="cuda"),
            blocksize=64, quant_type="nf4", dtype=torch.bfloat16, offset=a.offset, state2=outer,
        )  # fmt: skip


def random_weight(shape: tuple[int, int]) -> Weight:
    n, k = shape
    packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device="cuda")
    blocks = n * k // 64
    absmax = nf4.NestedAbsmax(
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda"),
        torch.linspace(-1, 1, 256, device="cuda"),
        torch.full((-(-blocks // 256),), 0.03, device="cuda"),
        torch.tensor(0.06, device="cuda"),
    )
    return Weight(shape, packed, absmax)


def replay_ms(run: Callable[[], None], replays: int) -> float:
    """Median time of one replay of run as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def inputs(shapes: Iterable[tuple[int, int]], rows: int) -> dict[int, Tensor]:
    return {k: torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for k in {k for _, k in shapes}}


def products(weights: list[Weight], x: dict[int, Tensor], backend: str | None = None) -> Callable[[], None]:
    def run():
        for w in weights:
            nf4.nf4_linear(x[w.shape[1]], w.packed, w.absmax, w.shape, backend=backend)

    return run


def tiled(weights: list[Weight], x: Tensor, tiles: nf4.Tiles) -> Callable[[], None]:
    def run():
        for w in weights:
            nf4._fused(x, w.packed, w.absmax, w.shape, None, tiles)

    return run


def table(args: Args) -> None:
    shapes, layers = MODELS[args.model]
    layers = args.layers or layers
    weights = [random_weight(shape) for _ in range(layers) for shape in shapes]
    states = [w.state() for w in weights] if bnb else []
    if args.expanded:
        for w in weights:
            w.absmax = nf4.expand_absmax(w.absmax)
    packed_bytes = sum(w.bytes() for w in weights)
    count = sum(n * k for n, k in shapes) * layers
    plain = [torch.empty(w.shape, device="cuda", dtype=torch.bfloat16).normal_(std=0.02) for w in weights]
    print(f"{len(weights)} products, {count / 1e9:.2f}e9 weights, {packed_bytes / 1e9:.2f} GB of codes and scales")
    print(f"{'rows':>5} | {'ours ms':>8}{'GB/s':>6} {'path':11}| {'dequantise':>10} | {'bnb ms':>8} | ", end="")
    print(f"{'bf16 ms':>8}{'GB/s':>6}")
    for rows in args.rows:
        x = inputs(shapes, rows)
        path = nf4._choose(next(iter(x.values())), rows, 4096)
        ms = replay_ms(products(weights, x), args.replays)
        chunks = replay_ms(products(weights, x, "dequantise"), 5)
        theirs = float("nan")
        if bnb:
            theirs = replay_ms(
                lambda x=x: [bnb.matmul_4bit(x[w.shape[1]], w.packed, s) for w, s in zip(weights, states)], args.replays
            )
        bf16 = replay_ms(lambda x=x: [F.linear(x[w.shape[1]], p) for w, p in zip(weights, plain)], args.replays)
        print(
            f"{rows:5} | {ms:8.2f}{packed_bytes / ms / 1e6:6.0f} {path:11}| {chunks:10.2f} | {theirs:8.2f} | "
            f"{bf16:8.2f}{2 * count / bf16 / 1e6:6.0f}",
            flush=True,
        )


def check(args: Args) -> bool:
    """Errors on fresh Gaussian weights and inputs, outputs poisoned with NaN. True if ours is never the worse."""
    torch.use_deterministic_algorithms(True)  # with it torch.empty fills what it returns with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    shapes = sorted({shape for model, _ in MODELS.values() for shape in model})
    print(f"{'N':>6}{'K':>6}  relative error, ours / bitsandbytes, for rows " + ", ".join(map(str, args.rows)))
    good = True
    for n, k in shapes:
        full = torch.randn(n, k, device="cuda") * 0.02
        packed, state = bnb.functional.quantize_4bit(full, quant_type="nf4", compress_statistics=True)
        state.dtype = torch.bfloat16
        absmax = nf4.absmax_of(state)
        exact_weight = nf4.nf4_dequantise_reference(packed, absmax, (n, k), torch.float64)
        cells = []
        for rows in args.rows:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            exact = x.double() @ exact_weight.T
            ours = relative_error(nf4.nf4_linear(x, packed, absmax, (n, k)), exact)
            theirs = relative_error(bnb.matmul_4bit(x, packed, state), exact)
            good &= ours <= theirs * 1.01
            cells.append(f"{1e3 * ours:.3f}/{1e3 * theirs:.3f}{'' if ours <= theirs * 1.01 else '!'}")
        print(f"{n:6}{k:6}  " + "  ".join(cells), flush=True)
    torch.use_deterministic_algorithms(False)
    print("1e-3; ours is never worse" if good else "1e-3; ! marks where ours is worse")
    return good


def candidates(rows: int) -> list[nf4.Tiles]:
    """Tiles to try; splits are filled in for each shape."""
    T = nf4.Tiles
    if rows <= 16:
        found = [T(64, 16, 1, 4, stages, wide=wide) for stages in (2, 3, 4) for wide in (True, False)]
        found += [T(128, 16, 1, 4, 3), T(128, 16, 1, 8, 3), T(64, 8, 1, 4, 3), T(64, 16, 1, 4, 4, group=2)]
    elif rows <= 32:
        found = [T(64, 32, 1, 4, 2), T(64, 32, 1, 4, 3), T(128, 32, 1, 8, 3), T(64, 32, 1, 4, 4, group=2)]
    elif rows <= 64:
        found = [T(64, 64, 1, 4, 2), T(64, 64, 1, 4, 3), T(128, 64, 1, 8, 2), T(128, 64, 1, 8, 3)]
        found += [T(64, 64, 1, 4, 4, group=2), T(128, 64, 1, 8, 4, group=2), T(128, 64, 1, 4, 3, group=2)]
    else:
        found = [T(128, 128, 1, 8, 2), T(128, 128, 1, 8, 3, group=2), T(64, 128, 1, 4, 2, group=2)]
        found += [T(64, 128, 1, 4, 3, group=2), T(128, 64, 1, 8, 3, group=2), T(64, 256, 1, 8, 2, group=2)]
    return found


def compile_tiles(args: Args) -> None:
    """Compile some of the candidates, both with and without split."""
    tiles = [t for rows in args.rows for t in candidates(rows)]
    weight = random_weight((256, 2048))
    for i in map(int, args.compile.split(",")):
        for splits in (1, 2):
            try:
                x = torch.randn(tiles[i].rows, 2048, device="cuda", dtype=torch.bfloat16)
                nf4._fused(x, weight.packed, weight.absmax, weight.shape, None, tiles[i]._replace(splits=splits))
            except Exception as error:  # too much shared memory, say: reported when it is timed
                print(tiles[i], str(error)[:200])
    torch.cuda.synchronize()


def compile_all(args: Args, processes: int = 12) -> None:
    count = sum(len(candidates(rows)) for rows in args.rows)
    jobs = []
    for p in range(min(processes, count)):
        indices = ",".join(map(str, range(p, count, processes)))
        command = [sys.executable, __file__, "--tune", "--compile", indices, "--rows", *map(str, args.rows)]
        jobs.append(subprocess.Popen(command))
    for job in jobs:
        job.wait()


def tune(args: Args) -> None:
    compile_all(args)
    shapes, layers = MODELS[args.model]
    layers = args.layers or layers
    for n, k in sorted(set(shapes)):
        weights = [random_weight((n, k)) for _ in range(layers)]
        floor = weights[0].bytes() / 3.0e6  # us at 3 TB/s
        for rows in args.rows:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            times = {}
            exact = (
                x.double() @ nf4.nf4_dequantise_reference(weights[0].packed, weights[0].absmax, (n, k), torch.float64).T
            )
            for tiles in candidates(rows):
                programs = -(-n // tiles.n) * -(-rows // tiles.rows)
                for splits in (1, 2, 3, 4, 6, 8, 12, 16):
                    if k // splits < 512 or not 100 < programs * splits < 1400:
                        continue
                    t = tiles._replace(splits=splits)

                    try:
                        times[t] = replay_ms(tiled(weights, x, t), args.replays) / layers * 1e3
                        y = nf4._fused(x, weights[0].packed, weights[0].absmax, (n, k), None, t)
                        error = relative_error(y, exact)
                        if not error < 3e-3:
                            print("WRONG", t, error)
                    except Exception as failure:
                        print(t, type(failure).__name__, str(failure)[:150])
                        break
            ranked = sorted(times, key=times.__getitem__)
            chosen = nf4.choose_tiles(rows, n, k, nf4._multiprocessors(x.device))
            print(
                f"{n} x {k}, {rows} rows: floor {floor:.1f} us; {len(times)} tried; default {times.get(chosen, -1):.1f}"
            )
            for t in ranked[: args.best]:
                print(f"   {times[t]:6.1f} us  {t}")
            pdl = ranked[0]._replace(pdl=True)
            try:
                us = replay_ms(tiled(weights, x, pdl), args.replays)
                y = nf4._fused(x, weights[0].packed, weights[0].absmax, (n, k), None, pdl)
                print(f"   {us / layers * 1e3:6.1f} us  the first with pdl, error {relative_error(y, exact):.1e}")
            except Exception as failure:
                print("   pdl", type(failure).__name__, str(failure)[:150])
            by_kind: dict = {}
            for t in ranked:
                by_kind.setdefault(t._replace(splits=0), times[t])
            print(
                "   best split of each: "
                + "; ".join(
                    f"{t.n},{t.rows},w{t.warps},s{t.stages},g{t.group}{'' if t.wide else ',thin'} {u:.1f}"
                    for t, u in by_kind.items()
                ),
                flush=True,
            )


def chunks(args: Args) -> None:
    shapes, layers = MODELS[args.model]
    layers = args.layers or 8
    weights = [random_weight(shape) for _ in range(layers) for shape in shapes]
    print(f"ms for {layers} layers; chunk MiB:", end="")
    sizes = (8, 16, 24, 32, 48, 1024)
    print(*(f"{s:8}" for s in sizes))
    for rows in args.rows:
        x = inputs(shapes, rows)
        cells = []
        for size in sizes:
            nf4.CHUNK_BYTES = size << 20
            cells.append(f"{replay_ms(products(weights, x, 'dequantise'), 7):8.2f}")
        print(f"{rows:5} rows", *cells, flush=True)
    out = torch.empty(14336, 4096, device="cuda", dtype=torch.bfloat16)
    large = [w for w in weights if w.shape[0] == 14336]
    if large:
        ms = replay_ms(
            lambda: [nf4.nf4_dequantise(w.packed, w.absmax, w.shape, torch.bfloat16, out=out) for w in large], 10
        )
        print(f"dequantise alone: {sum(w.bytes() + 4 * w.packed.numel() for w in large) / ms / 1e6:.0f} GB/s")


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.compile:
        compile_tiles(args)
    else:
        version = getattr(bnb, "__version__", "missing")
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bitsandbytes {version}")
        if args.check:
            sys.exit(not check(args))
        elif args.tune:
            tune(args)
        elif args.chunks:
            chunks(args)
        else:
            table(args)
