import pytest
import torch

from grpo.batch import StepTotals, make_batch, micro_batches, step_counts
from grpo.distributed import World
from grpo.objective import Objective
from grpo.sampler import Completion, Question, Samples

PROMPTS = [[1, 5], [1, 6, 7], [1], [1, 5, 6, 7]]
COMPLETIONS = [[8, 2], [9, 10, 11, 2], [12], [2]]
LOGPS = [[-0.1, -0.2], [-0.3, -0.4, -0.5, -0.6], [-0.7], [-0.8]]
ADVANTAGES = torch.tensor([1.0, -1.0, 2.0, 0.5])
STEP = StepTotals(8, 4, 16)


def cut(max_tokens, advantages=ADVANTAGES, **kw):
    return micro_batches(PROMPTS, COMPLETIONS, LOGPS, advantages, max_tokens=max_tokens, step=STEP, **kw)


def test_layout():
    """EOS (2) is a completion token like any other, also where it equals nothing but padding elsewhere."""
    (micro,) = cut(1000)
    assert micro.sequences == [1, 3, 0, 2]  # longest first
    assert micro.ids.tolist() == [
        [1, 6, 7, 9, 10, 11, 2],
        [1, 5, 6, 7, 2, 0, 0],
        [1, 5, 8, 2, 0, 0, 0],
        [1, 12, 0, 0, 0, 0, 0],
    ]
    assert micro.prompt_lengths.tolist() == [3, 4, 2, 1]
    assert micro.mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert torch.equal(micro.sampler_logps[2], torch.tensor([-0.1, -0.2, 0.0, 0.0]))
    assert micro.advantages.tolist() == [-1.0, 0.5, 1.0, 2.0]


@pytest.mark.parametrize(("max_tokens", "sizes"), [(1, [1, 1, 1, 1]), (10, [1, 2, 1]), (14, [2, 2]), (28, [4])])
def test_budget(max_tokens, sizes):
    micros = cut(max_tokens)
    assert [len(m.sequences) for m in micros] == sizes
    assert sorted(i for m in micros for i in m.sequences) == [0, 1, 2, 3]
    assert all(m.ids.numel() <= max_tokens or len(m.sequences) == 1 for m in micros)


def test_advantage_0_has_micro_batches_of_its_own():
    advantages = torch.tensor([0.0, 0.0, 3.0, -3.0])
    assert [m.sequences for m in cut(1000, advantages)] == [[3, 2], [1, 0]]
    assert [m.sequences for m in cut(7, advantages)] == [[3], [2], [1], [0]]
    assert [m.sequences for m in cut(1000, advantages * 0)] == [[1, 3, 0, 2]]


def test_advantages_of_tokens():
    """A micro-batch takes the columns of its own longest completion."""
    advantages = torch.tensor([[1.0, 2, 9, 9, 9], [0, 0, 0, 3, 9], [0, 0, 0, 0, 0], [4, 9, 9, 9, 9]])
    first, second, last = cut(10, advantages)
    assert (first.sequences, second.sequences, last.sequences) == ([1], [3, 0], [2])
    assert first.advantages.tolist() == [[0, 0, 0, 3]]
    assert second.advantages.tolist() == [[4, 9], [1, 2]]
    with pytest.raises(ValueError, match=r"advantages is \[4, 3\]: the longest completion has 4 tokens"):
        cut(10, advantages[:, :3])


def test_keep_leaves_out():
    micros = cut(1000, keep=[True, False, False, True])
    assert [m.sequences for m in micros] == [[3, 0]]


def test_counts():
    assert step_counts(COMPLETIONS) == (8, 4)


def test_a_steps_batch_knows_its_totals():
    """What does not count is in no micro-batch and no total; without KL and bonus, advantage 0 needs no gradient."""
    questions = [Question("", "", PROMPTS[0]), Question("", "", PROMPTS[1])]
    completions = [Completion(c, p, False) for c, p in zip(COMPLETIONS, LOGPS)]
    samples = Samples(questions, 2, completions, [""] * 4, 16)
    advantages, mask = torch.tensor([1.0, 0, 2, 0]), torch.tensor([True, True, True, False])
    batch = make_batch(samples, advantages, mask, Objective(), 1000, World())
    assert batch.tokens == 7
    assert [m.step for m in batch.micros] == [StepTotals(7, 3, 16)] * 2
    assert [m.needs_grad.tolist() for m in batch.micros] == [[True, True], [False]]
    assert [m.ids[0, :3].tolist() for m in batch.micros] == [[1, 5, 8], [1, 5, 9]]
    for objective in (Objective(beta=0.1), Objective(entropy_bonus=0.1)):
        assert all(m.needs_grad is None for m in make_batch(samples, advantages, mask, objective, 9, World()).micros)
    every = make_batch(samples, advantages, mask, Objective(), 9, World(), every_gradient=True)
    assert all(m.needs_grad is None for m in every.micros)
    assert make_batch(samples, advantages, ~mask[:1].expand(4), Objective(), 9, World()) == ([], 0)


def test_refuses():
    with pytest.raises(ValueError, match="4 prompts, 3 completions"):
        micro_batches(PROMPTS, COMPLETIONS[:3], LOGPS, ADVANTAGES, max_tokens=9, step=STEP)
    with pytest.raises(ValueError, match="sequence 1 has 2 tokens but 4 log-prob"):
        micro_batches(PROMPTS, [[8, 2], [1, 2], [12], [2]], LOGPS, ADVANTAGES, max_tokens=9, step=STEP)
    with pytest.raises(ValueError, match="sequence 2 has an empty completion"):
        micro_batches(PROMPTS, [[8, 2], [9, 10, 11, 2], [], [2]], LOGPS, ADVANTAGES, max_tokens=9, step=STEP)
