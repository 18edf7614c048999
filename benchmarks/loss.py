"""The loss, from hidden states to their gradient: time, memory and error of ours and of every peer that is installed.

    python benchmarks/loss.py              # 8 x 1024 tokens, hidden 4096, vocabulary 128,256, bf16
    python benchmarks/loss.py --sweep      # then up to 163,840 tokens, other vocabularies and hidden sizes

The loss is that of GRPO on policy, -mean(exp(logp - logp.detach()) * advantage), and the head is frozen. The floor is
the time of the matrix products that the method needs (one without gradient, two with forward and backward pass), each
measured as one bf16 product of the same size. Memory is the peak above what was allocated before; it includes the
gradient and all that is kept for the backward pass. Errors are against float64 on a sample of rows, half of which are
confident (p > 1 - 1e-4): ||x - exact|| / ||exact|| over the diffuse rows and over the confident ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.testing import do_bench

from grpo_kernels.linear_logprob import linear_logprob, linear_logprob_reference


@dataclass
class Args:
    sequences: int = 8
    """number of sequences in the batch"""
    length: int = 1024
    """number of completion tokens per sequence"""
    hidden: int = 4096
    """hidden size"""
    vocab: int = 128_256
    """vocabulary size"""
    sample: int = 64
    """number of rows whose error is measured"""
    milliseconds: int = 500
    """milliseconds spent on each measurement"""
    sweep: bool = False
    """also measure ours over numbers of tokens, vocabularies and hidden sizes"""


@dataclass
class Problem:
    x: Tensor  # [tokens, hidden]
    weight: Tensor  # [vocab, hidden]
    targets: Tensor  # [tokens]
    advantages: Tensor  # [sequences]

    def token_advantages(self) -> Tensor:
        return self.advantages.repeat_interleave(len(self.x) // len(self.advantages))


def make_problem(sequences: int, length: int, hidden: int, vocab: int) -> Problem:
    """Random hidden states; in every second row they point at their target (logit about 24, p about 1 - 1e-5)."""
    torch.manual_seed(0)
    tokens = sequences * length
    weight = torch.empty(vocab, hidden, device="cuda", dtype=torch.bfloat16).normal_().mul_(1.3 / hidden**0.5)
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    for rows in torch.arange(0, tokens, 2, device="cuda").split(4096):
        directions = weight[targets[rows]].float()
        x[rows] = (0.1 * x[rows] + 24 * directions / directions.square().sum(1, keepdim=True)).bfloat16()
    return Problem(x, weight, targets, torch.randn(sequences, device="cuda"))


Method = Callable[[Problem], tuple[Tensor | None, Tensor | None]]
"""a way to compute the loss: problem -> (log-probabilities, gradient of x), None where it does not have one"""


def from_logps(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Method:
    """Forward and backward pass of a function (x, weight, targets) -> logps under the loss above."""

    def method(p: Problem):
        leaf = p.x.detach().requires_grad_()
        logps = function(leaf, p.weight, p.targets)
        loss = -(torch.exp(logps - logps.detach()) * p.token_advantages()).mean()
        loss.backward()
        return logps.detach(), leaf.grad

    return method


def without_gradient(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Method:
    """The function alone."""

    def method(p: Problem):
        with torch.no_grad():
            return function(p.x, p.weight, p.targets), None

    return method


def ours(**options) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`linear_logprob` with these options."""
    return lambda x, weight, targets: linear_logprob(x, weight, targets, **options)[0]


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What most trainers do: logits in bf16, then cast to fp32."""
    logits = (x @ weight.T).float()
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def chunked(rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`plain` in chunks of rows, whose logits the backward pass computes again."""

    def function(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        parts = zip(x.split(rows), targets.split(rows))
        return torch.cat([checkpoint(plain, part, weight, t, use_reentrant=False) for part, t in parts])

    return function


def half_of_the_rows(p: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Ours, with a gradient for every second row only."""

    def function(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_logprob(x, weight, targets, grad_rows=torch.arange(len(x), device=x.device) % 2 == 0)[0]

    return from_logps(function)(p)[0], None  # half of the gradient is zero on purpose


def liger(p: Problem):
    """Liger-Kernel's fused linear GRPO loss, which returns no log-probabilities."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, chunk_size=1, loss_type="grpo")
    sequences = len(p.advantages)
    leaf = p.x.view(sequences, -1, p.x.shape[1]).detach().requires_grad_()
    targets = p.targets.view(sequences, -1)
    loss(leaf, p.weight, targets, torch.ones_like(targets, dtype=torch.float32), p.advantages)[0].backward()
    return None, None if leaf.grad is None else leaf.grad.view_as(p.x)


def cce(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Apple's cut cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(x, weight, targets, reduction="none")


METHODS: dict[str, tuple[Method, int]] = {
    "ours": (from_logps(ours()), 2),
    "ours, low_memory": (from_logps(ours(low_memory=True)), 2),
    "ours, entropy_grad": (from_logps(ours(entropy_grad=True)), 2),
    "ours, grad_rows: half": (half_of_the_rows, 2),
    "ours, torch row steps": (from_logps(ours(backend="torch")), 2),
    "plain, bf16 logits": (from_logps(plain), 2),
    "chunked, 512 rows": (from_logps(chunked(512)), 2),
    "chunked, 2048 rows": (from_logps(chunked(2048)), 2),
    "Liger fused linear GRPO": (liger, 2),
    "CCE": (from_logps(cce), 2),
    "ours, no gradient": (without_gradient(ours()), 1),
    "plain, no gradient": (without_gradient(plain), 1),
    "CCE, no gradient": (without_gradient(cce), 1),
}
"""methods by name, each with the number of matrix products that it needs at least"""


def product_ms(p: Problem, milliseconds: int) -> float:
    """Milliseconds of one bf16 product x @ weight.T of the problem's size, extrapolated from its first 4096 rows."""
    rows = min(len(p.x), 4096)
    return do_bench(lambda: p.x[:rows] @ p.weight.T, rep=milliseconds, return_mode="median") * len(p.x) / rows


def measure(method: Method, p: Problem, milliseconds: int) -> tuple[float, float]:
    """Median milliseconds, and peak GiB above what was allocated before."""
    method(p)  # compiles kernels, and allocates the libraries' workspaces
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    method(p)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return do_bench(lambda: method(p), warmup=100, rep=milliseconds, return_mode="median"), peak / 2**30


def exact(p: Problem, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and gradient of the sampled rows in float64."""
    leaf = p.x[rows].double().requires_grad_()
    logps, _ = linear_logprob_reference(leaf, p.weight.double(), p.targets[rows])
    (logps * -p.token_advantages()[rows].double() / len(p.x)).sum().backward()
    assert leaf.grad is not None
    return logps.detach(), leaf.grad


def plain_fp32(p: Problem, rows: Tensor, tensor_cores: bool) -> tuple[Tensor, Tensor]:
    """The same rows by way of whole fp32 logits of the bf16 inputs, which is the accuracy to reach.

    tensor_cores: products in bf16 with fp32 output, whose accumulation truncates, and the gradient of the logits
    rounded to bf16, as autograd does under mixed precision. Else all products are fp32."""
    x, weight = (t if tensor_cores else t.float() for t in (p.x[rows], p.weight))
    logits = torch.mm(x, weight.T, out_dtype=torch.float32).requires_grad_()
    logps = logits.log_softmax(1).gather(1, p.targets[rows, None]).squeeze(1)
    (logps * -p.token_advantages()[rows] / len(p.x)).sum().backward()
    assert logits.grad is not None
    return logps.detach(), (logits.grad.to(weight.dtype) @ weight).bfloat16()


def errors(actual: Tensor | None, expected: Tensor, confident: Tensor) -> str:
    """Relative errors over the diffuse rows and over the confident ones, as two cells of the table."""
    if actual is None:
        return "-        -      "
    parts = ((actual.double() - expected)[rows].norm() / expected[rows].norm() for rows in (~confident, confident))
    return " ".join(f"{e.item():.1e}".ljust(8) for e in parts)


def table(args: Args) -> None:
    """Print time, memory and errors of every method."""
    p = make_problem(args.sequences, args.length, args.hidden, args.vocab)
    tokens = len(p.x)
    one = product_ms(p, args.milliseconds)
    flops = 2 * tokens * args.hidden * args.vocab
    rows = torch.randperm(tokens, device="cuda")[: args.sample]
    confident = rows % 2 == 0
    logps, gradient = exact(p, rows)
    if not (logps[confident] > -1e-4).all():
        raise ValueError("confident rows are not confident: make_problem's logit of 24 is too small for this vocab")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{tokens} tokens, hidden {args.hidden}, vocabulary {args.vocab}, bf16; one product {one:.1f} ms")
    print(f"{'':26}{'ms':>7}{'TFLOP/s':>9}{'of floor':>9}{'GiB':>7}   logp error        gradient error")
    print(f"{'':58}   diffuse  confident diffuse  confident")
    for name, tensor_cores in (("plain, fp32 products", False), ("plain, fp32 logits", True)):
        reference = plain_fp32(p, rows, tensor_cores)
        found = f"{errors(reference[0], logps, confident)}  {errors(reference[1], gradient, confident)}"
        print(f"{name:26}{'':32}   {found}")
    for name, (method, products) in METHODS.items():
        try:
            ms, gib = measure(method, p, args.milliseconds)
            found_logps, found_gradient = (None if t is None else t[rows] for t in method(p))
        except ImportError:
            print(f"{name:26} not installed")
            continue
        except (RuntimeError, torch.OutOfMemoryError) as error:
            print(f"{name:26} failed: {str(error)[:80]}")
            continue
        found = f"{errors(found_logps, logps, confident)}  {errors(found_gradient, gradient, confident)}"
        rate = products * flops / ms / 1e9
        print(f"{name:26}{ms:7.1f}{rate:9.0f}{products * one / ms:9.0%}{gib:7.3f}   {found}", flush=True)


def sweep(args: Args) -> None:
    """Print time and memory of ours over numbers of tokens, vocabularies and hidden sizes."""
    sizes = [(tokens, args.hidden, args.vocab) for tokens in (256, 1024, 4096, 8191, 32_768, 163_840)]
    sizes += [(8192, args.hidden, vocab) for vocab in (32_768, 49_152, 100_352, 151_936, 50_257)]
    sizes += [(8192, hidden, args.vocab) for hidden in (5120, 3584, 1536)]
    print(f"\n{'tokens':>8}{'hidden':>8}{'vocab':>9} | {'no gradient':^25} | {'forward and backward':^32}")
    print(f"{'':25} | {'ms':>8}{'of floor':>9}{'GiB':>8} | {'ms':>8}{'us/token':>9}{'of floor':>9}{'GiB':>6}")
    for tokens, hidden, vocab in sizes:
        p = make_problem(1, tokens, hidden, vocab)
        one = product_ms(p, 100)
        ms, gib = measure(without_gradient(ours()), p, 100)
        line = f"{tokens:8}{hidden:8}{vocab:9} | {ms:8.2f}{one / ms:9.0%}{gib:8.3f}"
        ms, gib = measure(from_logps(ours()), p, 100)
        print(f"{line} | {ms:8.2f}{1000 * ms / tokens:9.2f}{2 * one / ms:9.0%}{gib:6.2f}", flush=True)


if __name__ == "__main__":
    args = tyro.cli(Args)
    table(args)
    if args.sweep:
        sweep(args)
