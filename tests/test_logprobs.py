"""completion_logps against full logits in float64, over every supported architecture."""

import pytest
import torch
from conftest import ARCHITECTURES
from transformers import AutoModelForCausalLM

from grpo.batch import StepTotals, micro_batches
from grpo.logprobs import completion_logps
from grpo.objective import Objective, policy_loss

PROMPTS = [[1, 9], [1, 10, 11, 12], [1, 12]]
COMPLETIONS = [[20, 2, 3], [30, 31, 32, 33, 2], [40]]
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5])


def make(max_tokens=1000):
    logps = [[-1.0] * len(c) for c in COMPLETIONS]
    return micro_batches(PROMPTS, COMPLETIONS, logps, ADVANTAGES, max_tokens=max_tokens, step=StepTotals(9, 3, 5))


def reference(model, temperature):
    """Per sequence, unpadded, full logits: lists of log-probabilities and entropies, in float64."""
    logps, entropies = [], []
    for p, c in zip(PROMPTS, COMPLETIONS):
        logits = model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1] / temperature
        table = logits.log_softmax(-1)
        logps.append(table[range(len(c)), c])
        entropies.append(-(table.exp() * table).sum(-1))
    return logps, entropies


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values(model_folder, architecture, temperature):
    folder = model_folder(architecture)
    model = AutoModelForCausalLM.from_pretrained(folder)
    logps, entropies = reference(AutoModelForCausalLM.from_pretrained(folder).double(), temperature)
    (micro,) = make()
    inside = torch.arange(micro.ids.shape[1]) < (micro.prompt_lengths + micro.mask.sum(1))[:, None]
    for pad_id in (0, 2, 17):  # whatever fills the padding, the EOS, too, changes nothing
        micro = micro._replace(ids=torch.where(inside, micro.ids, pad_id))
        with torch.no_grad():
            got, entropy = completion_logps(model, micro, temperature=temperature)
        assert got.dtype == entropy.dtype == torch.float32
        for row, i in enumerate(micro.sequences):
            n = len(COMPLETIONS[i])
            torch.testing.assert_close(got[row, :n].double(), logps[i], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(entropy[row, :n].double(), entropies[i], rtol=1e-5, atol=1e-5)
            assert not got[row, n:].any()
            assert not entropy[row, n:].any()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.model.parameters()])


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_micro_batches_give_the_gradient_of_one_batch_and_of_float64(model_folder, loss):
    """Exact accumulation, end to end, in fp32; and against plain float64 autograd."""
    folder = model_folder("llama")
    found = []
    for max_tokens in (1, 12, 1000):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for micro in make(max_tokens):
            logps, _ = completion_logps(model, micro, temperature=0.8)
            value, _ = policy_loss(
                logps, None, micro.advantages, micro.mask, Objective(loss=loss), token_count=9, sequence_count=3
            )
            value.backward()
        found.append(gradients(model))
    for other in found[:-1]:
        assert (other - found[-1]).norm() <= 3e-6 * found[-1].norm()  # 1.2e-6 seen on one CPU

    exact = AutoModelForCausalLM.from_pretrained(folder).double()
    logps, _ = reference(exact, 0.8)
    # On policy the gradient of -min(w A, clip(w) A) is -A grad log p.
    terms = [-(a * lp) for a, lp in zip(ADVANTAGES.double(), logps)]
    value = sum(t.sum() for t in terms) / 9 if loss == "dapo" else sum(t.mean() for t in terms) / 3
    value.backward()
    expected = gradients(exact)
    assert (found[-1].double() - expected).norm() <= 1e-5 * expected.norm()
