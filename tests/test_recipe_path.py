"""What the recipes call, from the model to the adapter's gradient: completion_logps, then the objective.

The path that CUDA takes (Triton kernels, in the interpreter where there is no GPU; rows without gradient left out) and
the path taken elsewhere are compared with the plain formulas: all logits in memory, autograd, every row. The functions
of this file serve tests/gpu/test_recipe_path.py, too."""

import functools
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import write_model

import grpo_kernels.linear_logprob as head
from grpo.batch import MicroBatch, StepBatch, StepTotals, micro_batches, rows_with_gradient
from grpo.distributed import World, sum_gradients
from grpo.logprobs import completion_logps
from grpo.objective import Objective, merge_metrics, policy_loss, step_entropy_threshold
from grpo.policy.models import Policy, load_policy, reference_policy, trainable_parameters
from grpo_kernels.linear_logprob import linear_logprob, linear_logprob_reference, triton

needs_triton = pytest.mark.skipif(triton is None, reason="no Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURE = 0.8
ADVANTAGES = torch.tensor([1.0, 0.0, 0.0, 0.0, -0.7, 2.0, -1.5, 0.0])
# KL and entropy bonus: every row has a gradient. The others leave out half of the rows, which have micro-batches of
# their own.
OBJECTIVES = {
    "dapo": Objective(loss="dapo", epsilon=0.1),
    "grpo with KL": Objective(loss="grpo", beta=0.1, importance="sequence_mask", importance_cap=4.0),
    "gspo": Objective(loss="gspo", epsilon=0.02),
    "cispo with entropy bonus": Objective(loss="cispo", entropy_bonus=0.05, importance="token_mask"),
    "sapo, uncertain tokens": Objective(loss="sapo", top_entropy_quantile=0.5, off_policy_threshold=0.05),
}


class Problem(NamedTuple):
    """A step's micro-batches on the CPU, and log-probabilities of an old policy for each."""

    micros: list[MicroBatch]
    old_logps: list[torch.Tensor]


class Result(NamedTuple):
    logps: torch.Tensor
    """[tokens of the step] float64, as all on the CPU"""
    gradient: torch.Tensor
    """of the adapter, [parameters]"""
    metrics: dict[str, float]


def write_tiny(folder) -> str:
    return str(write_model(folder, vocab_size=1003, hidden_size=128, intermediate_size=192, head_dim=32,
                           initializer_range=0.05))  # fmt: skip


def load(folder: str, device: str):
    """The recipes' policy, NF4 with LoRA, some steps on: at the start B is 0, and so is A's gradient."""
    model = load_policy(Policy(folder, lora_rank=4, lora_alpha=4), device=device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def make_problem(model) -> Problem:
    """Eight answers of 1 to 12 tokens; old and sampler's log-probabilities are some way from the model's own."""
    generator = torch.Generator().manual_seed(2)

    def ids(length):
        return torch.randint(8, 1003, (length,), generator=generator).tolist()

    completions = [ids(n) for n in (12, 12, 9, 8, 8, 5, 3, 1)]
    micros = micro_batches(
        [ids(n) for n in (3, 3, 5, 4, 4, 6, 2, 3)], completions, [[0.0] * len(c) for c in completions], ADVANTAGES,
        max_tokens=32, step=StepTotals(58, 8, 12),
    )  # fmt: skip
    old = []
    for i, micro in enumerate(micros):
        with torch.no_grad():
            logps, _ = completion_logps(model, micro, temperature=TEMPERATURE)
        noise = 0.15 * torch.randn(2, *logps.shape, generator=generator) * micro.mask
        old.append(logps + noise[0])
        micros[i] = micro._replace(sampler_logps=logps + noise[1])
    assert any(not micro.advantages.any() for micro in micros)
    return Problem(micros, old)


def plain_linear_logprob(hidden, weight, targets, *, entropy_grad=False, grad_rows=None, **options):
    assert grad_rows is None
    return linear_logprob_reference(hidden, weight, targets, **options)


def update(model, problem: Problem, objective: Objective, backend: str, *, every_row: bool = False) -> Result:
    """One update as in the recipes, up to the adapter's gradient.

    backend: 'dispatched' (what the recipes get), 'triton', 'torch', or 'plain' for the formulas with all logits."""
    function = plain_linear_logprob if backend == "plain" else linear_logprob
    if backend in ("triton", "torch"):
        function = functools.partial(linear_logprob, backend=backend)
    every_row = every_row or backend == "plain" or bool(objective.beta or objective.entropy_bonus)
    device = next(model.parameters()).device
    forward = functools.partial(
        completion_logps, model, temperature=TEMPERATURE, entropy_grad=objective.entropy_bonus > 0
    )
    found, metrics = [], []
    with mock.patch.object(head, "linear_logprob", function):
        micros = [
            MicroBatch(
                *(x.to(device) for x in m[:5]), m.sequences, m.step, None if every_row else rows_with_gradient(m)
            )
            for m in problem.micros
        ]
        if not every_row:
            micros = [micro._replace(needs_grad=rows_with_gradient(micro)) for micro in micros]
        threshold = step_entropy_threshold(forward, StepBatch(micros, 58), objective, World(device=device))
        for micro, old in zip(micros, problem.old_logps):
            ref_logps = None
            if objective.beta:
                with reference_policy(model):
                    ref_logps, _ = forward(micro)
            logps, entropy = forward(micro)
            loss, of_micro = policy_loss(
                logps, old.to(device), micro.advantages, micro.mask, objective, ref_logps=ref_logps,
                sampler_logps=micro.sampler_logps, entropy=entropy, entropy_threshold=threshold,
                token_count=micro.step.tokens, sequence_count=micro.step.sequences, max_completion_length=12,
            )  # fmt: skip
            loss.backward()
            metrics.append(of_micro)
            found.append(logps.detach()[micro.mask.bool()])
    parameters = trainable_parameters(model)
    sum_gradients(parameters, World())
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    model.zero_grad()
    return Result(torch.cat(found).double().cpu(), gradient.double().cpu(), merge_metrics(metrics))


def assert_same(actual: Result, expected: Result, values: float, gradient: float) -> None:
    """Within `values` nats for log-probabilities, relative or absolute for metrics; the gradient by relative norm."""
    torch.testing.assert_close(actual.logps, expected.logps, rtol=0, atol=values)
    assert actual.metrics == pytest.approx(expected.metrics, rel=values, abs=values)
    assert expected.gradient.norm() > 1e-3
    assert (actual.gradient - expected.gradient).norm() <= gradient * expected.gradient.norm()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Model and problem, in fp32 on the CPU."""
    model = load(write_tiny(tmp_path_factory.mktemp("tiny")), "cpu")
    return model, make_problem(model)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of rows and of columns, ragged at the end."""
    monkeypatch.setattr(head, "_tile", lambda tokens, use: (13, 256))


@pytest.mark.parametrize("backend", ["dispatched", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_plain_formulas(tiny, small_tiles, name, backend):
    actual, expected = (update(*tiny, OBJECTIVES[name], b) for b in (backend, "plain"))
    assert_same(actual, expected, values=1e-5, gradient=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_without_gradient_change_nothing(tiny, small_tiles, name):
    """Neither the adapter's gradient nor a metric, whether they are left out or not."""
    left_out, every_row = (update(*tiny, OBJECTIVES[name], "torch", every_row=every) for every in (False, True))
    assert_same(left_out, every_row, values=2e-6, gradient=2e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_without_gradient(tiny, checkpointing):
    """No backward pass goes through the layers for them; where a step has no others (every group all right or all
    wrong) backward() runs still, and the gradient is zero, not missing."""
    model, problem = tiny
    passes = []
    base = model.get_base_model()
    hook = base.model.layers[0].register_full_backward_hook(lambda *_: passes.append(1))
    idle = [m._replace(advantages=torch.zeros_like(m.advantages)) for m in problem.micros]
    try:
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            base.enable_input_require_grads()
        update(model, problem, OBJECTIVES["dapo"], "dispatched")
        assert len(passes) == sum(bool(m.advantages.any()) for m in problem.micros) == len(problem.micros) - 2
        result = update(model, problem._replace(micros=idle), OBJECTIVES["dapo"], "dispatched")
    finally:
        hook.remove()
        base.gradient_checkpointing_disable()
        if checkpointing:
            base.disable_input_require_grads()
    assert len(passes) == len(problem.micros) - 2
    assert (result.gradient == 0).all()
    assert result.metrics["entropy"] > 1
