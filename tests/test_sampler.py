import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.sampler import prompt_indices


@given(seed=st.integers(0, 5), size=st.integers(1, 40), per_step=st.integers(1, 12), world=st.integers(1, 4))
def test_every_question_once_an_epoch_whatever_the_world(seed, size, per_step, world):
    per_step *= world
    steps = -(-3 * size // per_step)
    whole = [i for s in range(steps) for i in prompt_indices(seed, s, per_step, size)]
    for epoch in range(len(whole) // size):
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))
    for s in range(steps):  # the ranks' questions, interleaved, are those of one process alone
        ranks = [prompt_indices(seed, s, per_step, size, rank=r, world_size=world) for r in range(world)]
        assert [i for row in zip(*ranks) for i in row] == whole[s * per_step : (s + 1) * per_step]


def test_depends_on_seed_and_epoch():
    first = prompt_indices(0, 0, 50, 50)
    assert first != prompt_indices(1, 0, 50, 50)
    assert first != prompt_indices(0, 1, 50, 50)
    assert prompt_indices(1, 0, 50, 50) != prompt_indices(0, 1, 50, 50)
    assert first == prompt_indices(0, 0, 50, 50)


@pytest.mark.parametrize(
    ("per_step", "size", "world", "words"),
    [(3, 10, 2, "--prompts-per-step 3"), (0, 10, 1, "--prompts-per-step 0"), (1, 0, 1, "data set is empty")],
)
def test_refuses(per_step, size, world, words):
    with pytest.raises(ValueError, match=words):
        prompt_indices(0, 0, per_step, size, world_size=world)
