"""NF4 matrix products of a whole model, and their errors: ours beside bitsandbytes' and beside bfloat16 ones.

    python benchmarks/nf4.py                    # Llama 3.1 8B: 224 products, 1 to 2048 rows
    python benchmarks/nf4.py --check            # errors against float64 for the shapes of 1.5B to 70B models
    python benchmarks/nf4.py --joined           # q, k, v merged, and gate, up merged, as the vLLM engine runs them
    python benchmarks/nf4.py --joined --lora 16 # ours with an adapter too: fused, and by two products per slice
    python benchmarks/nf4.py --joined --lora 16 --single # and each shape alone
    python benchmarks/nf4.py --tune --joined --rows 256 128 64   # tile sizes of the fused kernels, each shape alone
    python benchmarks/nf4.py --chunks           # chunk sizes of the path for many rows

One measurement replays a CUDA graph of the linear layers of all the model's layers and reports the median. Each layer
has weights of its own (3.5 GB in all), so that the L2 cache serves none of them. Scales are double-quantized. GB/s
counts the codes and the scales (bf16: the weights), each once.
"""

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import grpo_kernels.nf4.linear as nf4
from grpo_kernels.nf4.dequantize import NestedAbsmax, absmax_of, expand_absmax
from grpo_kernels.nf4.prologue import Lora, new_counters
from grpo_kernels.nf4.tiles import FEW_ROWS_TILE, Tiles

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

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
"""linear layers of one decoder layer as (N, K), in the order q, k, v, o, gate, up, down, and the number of layers"""
DEVICE = "cuda"
STARTED = time.monotonic()


@dataclass
class Args:
    model: str = "llama-3.1-8b"
    """model whose linear layers are measured: llama-3.1-8b (as Mistral 7B), qwen-2.5-1.5b, qwen-2.5-7b, phi-4,
    llama-3.1-70b"""
    layers: int | None = None
    """number of layers; None: as many as the model has"""
    rows: list[int] = field(default_factory=lambda: [1, 8, 16, 32, 64, 128, 256, 512, 2048])
    """numbers of rows of x"""
    check: bool = False
    """measure errors instead, for the shapes of every model"""
    tune: bool = False
    """time many tile sizes instead: each shape alone, then the best of each in one graph"""
    joined: bool = False
    """merge q, k, v into one product and gate, up into one, as the vLLM engine does"""
    lora: int | None = None
    """rank of an adapter: adds two columns, ours with the adapter's product fused and with it in torch afterwards"""
    single: bool = False
    """also time each shape alone, in us, without and with the adapter"""
    seconds: float = 140
    """seconds after which --tune times nothing more"""
    chunks: bool = False
    """time chunk sizes instead"""
    expanded: bool = False
    """expand the scales to float32 for ours, which then dequantizes above 16 rows; else they are double-quantized"""
    replays: int = 20
    """number of replays of each graph"""
    best: int = 4
    """number of tile sizes that --tune prints per shape"""
    compile: int | None = None
    """internal: index of the tiles that this process compiles and checks for --tune"""


@dataclass
class Weight:
    shape: tuple[int, int]
    packed: Tensor
    absmax: NestedAbsmax | Tensor

    def bytes(self) -> int:
        nested = isinstance(self.absmax, NestedAbsmax)
        return self.packed.numel() + (self.absmax.quantized.numel() if nested else 4 * self.absmax.numel())

    def state(self):
        """The same as bitsandbytes' QuantState."""
        a = self.absmax
        outer = bnb.functional.QuantState(absmax=a.absmax, code=a.code, blocksize=256, dtype=torch.float32)
        return bnb.functional.QuantState(
            absmax=a.quantized, shape=torch.Size(self.shape), code=bnb.functional.get_4bit_type("nf4", device="cuda"),
            blocksize=64, quant_type="nf4", dtype=torch.bfloat16, offset=a.offset.flatten()[0], state2=outer,
        )  # fmt: skip


def layer_shapes(args: Args) -> list[tuple[int, int]]:
    """(N, K) of one layer's products, in the order in which they run."""
    shapes, _ = MODELS[args.model]
    if not args.joined or len(shapes) == 4:  # Phi-4's are merged already
        return shapes
    q, k, v, o, gate, up, down = shapes
    return [(q[0] + k[0] + v[0], q[1]), o, (gate[0] + up[0], gate[1]), down]


def random_weight(shape: tuple[int, int], joined: bool = False) -> Weight:
    """Random codes and scales. joined: with an offset for each second-level scale, as merged weights have."""
    n, k = shape
    packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, device=DEVICE)
    blocks = n * k // 64
    outer = torch.full((-(-blocks // 256),), 0.03, device=DEVICE)
    absmax = NestedAbsmax(
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=DEVICE),
        torch.linspace(-1, 1, 256, device=DEVICE),
        outer,
        2 * outer if joined else torch.tensor(0.06, device=DEVICE),
    )
    return Weight(shape, packed, absmax)


def replay_ms(run: Callable[[], None], replays: int) -> float:
    """Median milliseconds of one replay of run as a CUDA graph."""
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
    return {k: torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16) for k in {k for _, k in shapes}}


def products(weights: list[Weight], x: dict[int, Tensor], backend: str | None = None) -> Callable[[], None]:
    def run():
        for w in weights:
            nf4.nf4_linear(x[w.shape[1]], w.packed, w.absmax, w.shape, backend=backend)

    return run


def slice_ends(args: Args, shape: tuple[int, int]) -> tuple[int, ...]:
    """Rows at which q, k, v or gate, up end in a merged product; (N,) for any other."""
    single = MODELS[args.model][0]
    if len(single) == 4:  # Phi-4, whose adapter is one of the merged product
        return (shape[0],)
    for part in (single[:3], single[4:6]):
        ends = tuple(itertools.accumulate(n for n, _ in part))
        if args.joined and shape == (ends[-1], part[0][1]):
            return ends
    return (shape[0],)


def random_lora(args: Args, shape: tuple[int, int]) -> Lora:
    (n, k), ends = shape, slice_ends(args, shape)
    a = torch.randn(len(ends) * args.lora, k, device=DEVICE) / k**0.5
    return Lora(a.bfloat16(), torch.randn(n, args.lora, device=DEVICE).bfloat16(), ends, new_counters(DEVICE))


def adapted(weights: list[Weight], x: dict[int, Tensor], loras: list[Lora], fused: bool) -> Callable[[], None]:
    """Products with an adapter each, which is added within the product or afterwards in torch."""

    def run():
        for w, lora in zip(weights, loras):
            rows = x[w.shape[1]]
            y = nf4.nf4_linear(rows, w.packed, w.absmax, w.shape, lora=lora if fused else None)
            if not fused:
                nf4._add_lora(y, rows, lora)

    return run


def tiled(weights: list[Weight], x: dict[int, Tensor], tiles: dict[tuple[int, int], Tiles]) -> Callable[[], None]:
    """Products by the fused kernels with these tiles per shape."""

    def run():
        for w in weights:
            nf4._fused(x[w.shape[1]], w.packed, w.absmax, w.shape, None, tiles[w.shape])

    return run


def table(args: Args) -> None:
    """Print the time of all products for each number of rows, by each way."""
    shapes, layers = layer_shapes(args), args.layers or MODELS[args.model][1]
    weights = [random_weight(shape, args.joined) for _ in range(layers) for shape in shapes]
    states = [w.state() for w in weights] if bnb else []
    if args.expanded:
        for w in weights:
            w.absmax = expand_absmax(w.absmax)
    packed_bytes = sum(w.bytes() for w in weights)
    count = sum(n * k for n, k in shapes) * layers
    plain = [torch.empty(w.shape, device="cuda", dtype=torch.bfloat16).normal_(std=0.02) for w in weights]
    loras = [random_lora(args, w.shape) for w in weights] if args.lora else []
    print(f"{len(weights)} products, {count / 1e9:.2f}e9 weights, {packed_bytes / 1e9:.2f} GB of codes and scales")
    print(f"{'rows':>5} | {'ours ms':>8}{'GB/s':>6} {'path':11}| {'dequantize':>10} | {'bnb ms':>8} | ", end="")
    print(f"{'bf16 ms':>8}{'GB/s':>6}" + (f" | rank {args.lora}: fused ms, after it" if args.lora else ""))
    for rows in args.rows:
        x = inputs(shapes, rows)
        path = nf4.choose_backend(next(iter(x.values())), rows, 4096)
        if args.expanded and rows > FEW_ROWS_TILE and path == "fused":
            path = "dequantize"
        ms = replay_ms(products(weights, x), args.replays)
        chunks = replay_ms(products(weights, x, "dequantize"), 5)
        theirs = float("nan")
        if bnb:
            theirs = replay_ms(
                lambda x=x: [bnb.matmul_4bit(x[w.shape[1]], w.packed, s) for w, s in zip(weights, states)], args.replays
            )
        bf16 = replay_ms(lambda x=x: [F.linear(x[w.shape[1]], p) for w, p in zip(weights, plain)], args.replays)
        print(
            f"{rows:5} | {ms:8.2f}{packed_bytes / ms / 1e6:6.0f} {path:11}| {chunks:10.2f} | {theirs:8.2f} | "
            f"{bf16:8.2f}{2 * count / bf16 / 1e6:6.0f}",
            end="" if loras else "\n",
            flush=True,
        )
        if loras:
            fused, after = (replay_ms(adapted(weights, x, loras, way), args.replays) for way in (True, False))
            print(f" |{fused:17.2f}{after:10.2f}", flush=True)
        for shape in dict.fromkeys(shapes) if args.single else ():
            alone = [i for i, w in enumerate(weights) if w.shape == shape]
            runs = [products([weights[i] for i in alone], x)]
            runs += [adapted([weights[i] for i in alone], x, [loras[i] for i in alone], True)] if loras else []
            us = [1e3 * replay_ms(run, args.replays) / len(alone) for run in runs]
            print(f"      {shape[0]:6} x {shape[1]:5}:" + "".join(f"{u:7.1f} us" for u in us), flush=True)


def check(args: Args) -> bool:
    """Print errors for new Gaussian weights and inputs, with outputs poisoned with NaN. True if ours is never worse."""
    torch.use_deterministic_algorithms(True)  # then torch.empty fills what it returns with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    shapes = sorted({shape for model, _ in MODELS.values() for shape in model})
    print(f"{'N':>6}{'K':>6}  relative error, ours / bitsandbytes, for rows " + ", ".join(map(str, args.rows)))
    good = True
    for n, k in shapes:
        full = torch.randn(n, k, device="cuda") * 0.02
        packed, state = bnb.functional.quantize_4bit(full, quant_type="nf4", compress_statistics=True)
        state.dtype = torch.bfloat16
        absmax = absmax_of(state)
        exact_weight = nf4.nf4_dequantize_reference(packed, absmax, (n, k), torch.float64)
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


def candidates(rows: int) -> list[Tiles]:
    """Tiles to try, with one split; `splits_of` says which splits to try for a shape."""
    T = Tiles
    chosen = nf4.choose_tiles(rows, 2**17, 4096, 132)._replace(splits=1)
    if rows <= FEW_ROWS_TILE:
        few = [T(16, 8 if rows <= 8 else 16, 1, warps, 1) for warps in (2, 4, 8, 16)]
        few += [tiles._replace(registers=registers) for tiles in few[1:3] for registers in (80, 96)]
        return list(dict.fromkeys([chosen, *few]))
    if rows <= 64:
        height = 32 if rows <= 32 else 64
        found = [T(64, height, 1, 4, 3), T(64, height, 1, 4, 4), T(128, height, 1, 8, 3), T(128, height, 1, 8, 4)]
    elif rows <= 128:
        found = [T(64, 128, 1, 4, stages) for stages in (3, 4)] + [T(64, 64, 1, 4, 3), T(128, 64, 1, 8, 3)]
        found += [T(128, 128, 1, 8, 4), T(128, 128, 1, 8, 3, registers=128)]
    else:
        found = [T(128, 256, 1, 8, 3), T(128, 128, 1, 8, 4), T(128, 128, 1, 8, 3, registers=128), T(64, 256, 1, 4, 3)]
    return list(dict.fromkeys([chosen, *found]))


def all_candidates(args: Args) -> list[Tiles]:
    return list(dict.fromkeys(tiles for rows in args.rows for tiles in candidates(rows)))


def fused_error(x: Tensor, weight: Weight, tiles: Tiles, exact: Tensor) -> float:
    """Relative error of a fused product; whatever the kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        return relative_error(nf4._fused(x, weight.packed, weight.absmax, weight.shape, None, tiles), exact)
    finally:
        torch.use_deterministic_algorithms(False)


def compile_tiles(args: Args) -> bool:
    """Compile one of the candidates, with and without splits, and check it; False if it is wrong or does not run."""
    tiles = all_candidates(args)[args.compile]
    weight = random_weight((304, 2048), args.joined)  # N is a multiple of 16, as in models: no second compilation
    rows = tiles.rows - 3 if tiles.n == FEW_ROWS_TILE else 2 * tiles.rows - 3
    x = torch.randn(rows, 2048, device=DEVICE, dtype=torch.bfloat16)
    exact = x.double() @ nf4.nf4_dequantize_reference(weight.packed, weight.absmax, weight.shape, torch.float64).T
    for splits in (1,) if tiles.n == FEW_ROWS_TILE else (1, 2):
        t = tiles._replace(splits=splits, pdl=DEVICE == "cuda")
        try:
            error = fused_error(x, weight, t, exact)
            problem, good = f"error {error:.2e}", error < 3e-3
        except Exception as failure:  # too much shared memory, for example
            problem, good = f"{type(failure).__name__} {str(failure)[:200]}", False
        if not good:
            print("left out:", t, problem, flush=True)
            return False
    return True


def compile_all(args: Args) -> set[Tiles]:
    """The candidates that run and are right. Each is compiled and tried in a process of its own, all at once, so that
    one that fails or hangs does not affect the others."""
    command = [sys.executable, __file__, "--tune", *["--joined"] * args.joined, "--rows", *map(str, args.rows)]
    every = all_candidates(args)
    jobs = [subprocess.Popen([*command, "--compile", str(i)]) for i in range(len(every))]
    good = set()
    for tiles, job in zip(every, jobs):
        try:
            if job.wait(timeout=max(1.0, args.seconds / 2 - time.monotonic() + STARTED)) == 0:
                good.add(tiles)
        except subprocess.TimeoutExpired:
            job.kill()
            print("left out, not done in time:", tiles)
    print(f"{len(good)} of {len(every)} tiles run and are right, after {time.monotonic() - STARTED:.0f} s", flush=True)
    return good


def splits_of(tiles: Tiles, n: int, k: int, rows: int, multiprocessors: int) -> list[int]:
    """Splits that are worth a try: the programs fill the multiprocessors, and are not too many."""
    if tiles.n == FEW_ROWS_TILE:
        return [1]
    programs = -(-n // tiles.n) * -(-rows // tiles.rows)
    most = (10 if rows <= 64 else 5) * multiprocessors
    more = [s for s in (2, 3, 4, 5, 6, 8, 12, 16) if programs * (s - 1) < 3 * multiprocessors and programs * s < most]
    return [1, *(s for s in more if k // s >= 512)]


def layer_us(weights: list[Weight], x: dict[int, Tensor], tiles: dict[tuple[int, int], Tiles], args: Args) -> float:
    """us per layer for these weights; NaN, and a line that says why, if it fails."""
    try:
        layers = args.layers or MODELS[args.model][1]
        return replay_ms(tiled(weights, x, tiles), args.replays) / layers * 1e3
    except Exception as failure:
        print("   ", *tiles.values(), type(failure).__name__, str(failure)[:150], flush=True)
        return float("nan")


def tune_shape(weights: list[Weight], x: Tensor, args: Args, good: set[Tiles], chosen: Tiles) -> dict[Tiles, float]:
    """us per layer for the products of this shape, by tiles, the best first. chosen: tiles that are tried first."""
    w, rows = weights[0], len(x)
    n, k = w.shape
    exact = x.double() @ nf4.nf4_dequantize_reference(w.packed, w.absmax, w.shape, torch.float64).T
    limit = 3e-3
    if bnb and DEVICE == "cuda":
        limit = 1.01 * relative_error(bnb.matmul_4bit(x, w.packed, w.state()), exact)
    tries, multiprocessors = [chosen], nf4._multiprocessors(x.device)
    for t in candidates(rows):
        tries += [t._replace(splits=s, pdl=chosen.pdl) for s in splits_of(t, n, k, rows, multiprocessors)]
    tries = [t for t in dict.fromkeys(tries) if t._replace(splits=1, pdl=False) in good]
    times, errors = {}, {}
    for t in tries:
        if time.monotonic() - STARTED > args.seconds and t != chosen:
            print("    out of time")
            break
        us = layer_us(weights, {k: x}, {w.shape: t}, args)
        if us == us:
            errors[t] = fused_error(x, w, t, exact)
            if errors[t] < limit:
                times[t] = us
            else:
                print(f"    WRONG {t} {errors[t]:.2e}, must be below {limit:.2e}")
    ranked = sorted(times, key=times.__getitem__)
    count = len(weights) // (args.layers or MODELS[args.model][1])
    floor = count * w.bytes() / 3.0e6  # us at 3 TB/s
    print(f"{n} x {k}, {count} per layer, {rows} rows: floor {floor:.1f} us, {len(times)} of {len(tries)} timed")
    for t in dict.fromkeys([*ranked[: args.best], *([chosen] if chosen in times else [])]):
        print(f"   {times[t]:6.1f} us  error {errors[t]:.2e}  {t}{'  chosen' if t == chosen else ''}", flush=True)
    return {t: times[t] for t in ranked}


def tune(args: Args, good: set[Tiles]) -> None:
    """Print times of the tiles in `good` for each shape alone, then of the chosen and of the best ones in one graph."""
    shapes, layers = layer_shapes(args), args.layers or MODELS[args.model][1]
    weights = [random_weight(shape, args.joined) for _ in range(layers) for shape in shapes]
    device = weights[0].packed.device
    pdl = DEVICE == "cuda" and nf4.is_hopper(device)
    for rows in args.rows:
        x = inputs(shapes, rows)
        found: dict[str, dict] = {"chosen": {}, "best": {}}
        sums = dict.fromkeys(found, 0.0)
        for shape in dict.fromkeys(shapes):
            chosen = nf4.choose_tiles(rows, *shape, nf4._multiprocessors(device))._replace(pdl=pdl)
            times = tune_shape([w for w in weights if w.shape == shape], x[shape[1]], args, good, chosen)
            for name, t in (("chosen", chosen), ("best", next(iter(times), None))):
                if t in times:
                    found[name][shape] = t
                sums[name] += times.get(t, float("nan")) * layers / 1e3
        for name, tiles in found.items():
            whole = float("nan")
            if len(tiles) == len(set(shapes)):
                whole = layer_us(weights, x, tiles, args) * layers / 1e3
            print(f"{rows} rows, {layers} layers, {name}: sum of single shapes {sums[name]:.2f} ms, ", end="")
            print(f"in one graph {whole:.2f} ms  ({time.monotonic() - STARTED:.0f} s)", flush=True)


def chunks(args: Args) -> None:
    """Print the time of the path that dequantizes, by the size of its buffer."""
    shapes, layers = layer_shapes(args), args.layers or 8
    weights = [random_weight(shape, args.joined) for _ in range(layers) for shape in shapes]
    print(f"ms for {layers} layers; chunk MiB:", end="")
    sizes = (8, 16, 24, 32, 48, 1024)
    print(*(f"{s:8}" for s in sizes))
    for rows in args.rows:
        x = inputs(shapes, rows)
        cells = []
        for size in sizes:
            nf4.CHUNK_BYTES = size << 20
            cells.append(f"{replay_ms(products(weights, x, 'dequantize'), 7):8.2f}")
        print(f"{rows:5} rows", *cells, flush=True)
    out = torch.empty(14336, 4096, device="cuda", dtype=torch.bfloat16)
    large = [w for w in weights if w.shape[0] == 14336]
    if large:
        ms = replay_ms(
            lambda: [nf4.nf4_dequantize(w.packed, w.absmax, w.shape, torch.bfloat16, out=out) for w in large], 10
        )
        print(f"dequantize alone: {sum(w.bytes() + 4 * w.packed.numel() for w in large) / ms / 1e6:.0f} GB/s")


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.compile is not None:
        sys.exit(not compile_tiles(args))
    good = compile_all(args) if args.tune else set()
    version = getattr(bnb, "__version__", "missing")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bitsandbytes {version}")
    if args.check:
        sys.exit(not check(args))
    elif args.tune:
        tune(args, good)
    elif args.chunks:
        chunks(args)
    else:
        table(args)
