import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.advantages import (
    Advantage,
    Scores,
    group_advantages,
    group_rewards,
    per_sample,
    reward_baseline,
    reward_scale,
    sample_mask,
    zero_variance_groups,
)
from grpo.sampler import Completion, Samples
from grpo.tasks.scoring import score

NAN = float("nan")
rewards_lists = st.lists(st.one_of(st.none(), st.floats(-10, 10, width=16)), min_size=12, max_size=12)  # 3 groups of 4


def composed(scores, group_size, flags):
    """[samples]: the lines of the recipes."""
    rewards = group_rewards(scores, group_size, flags)
    return per_sample((rewards - reward_baseline(rewards, flags)) / reward_scale(rewards, flags))


def gdpo(rewards, group_size, weights):
    """rewards: [functions][samples]."""
    named = {str(i): list(values) for i, values in enumerate(rewards)}
    total = [0.0] * len(named["0"])
    return composed(Scores(total, named, dict(zip(named, weights)), []), group_size, Advantage(aggregate="gdpo"))


def test_known_values():
    a = group_advantages([1, 0, 0, 0, 2, 2, 4, 4], 4)
    assert a.dtype == torch.float32
    first, second = 0.5 + 1e-4, math.sqrt(4 / 3) + 1e-4  # deviations over n - 1
    assert a[:4].tolist() == pytest.approx([0.75 / first, -0.25 / first, -0.25 / first, -0.25 / first])
    assert a[4:].tolist() == pytest.approx([-1 / second, -1 / second, 1 / second, 1 / second])


def test_scales_and_baselines():
    rewards = [1, 0, 0, 0, 2, 2, 4, 4]
    assert group_advantages(rewards, 4, scale="none").tolist() == [0.75, -0.25, -0.25, -0.25, -1, -1, 1, 1]
    # the mean of the others: (1 - 0), (0 - 1/3), ..., (2 - 10/3), ..., (4 - 8/3)
    assert group_advantages(rewards, 4, scale="none", baseline="rloo").tolist() == pytest.approx(
        [1, -1 / 3, -1 / 3, -1 / 3, -4 / 3, -4 / 3, 4 / 3, 4 / 3]
    )
    assert group_advantages([1, None, 0], 3, scale="none", baseline="rloo").tolist() == [1, 0, -1]
    std = torch.tensor(rewards, dtype=torch.float64).std().item()  # of all rewards, around their common mean
    assert group_advantages(rewards, 4, scale="batch").tolist() == pytest.approx(
        [x / (std + 1e-4) for x in (0.75, -0.25, -0.25, -0.25, -1, -1, 1, 1)]
    )


@settings(max_examples=50)
@given(rewards=rewards_lists)
def test_equals_trl(rewards):
    """TRL 1.16's lines, which have no function of their own, around its nanstd."""
    from trl.trainer.utils import nanstd

    r = torch.tensor([NAN if x is None else x for x in rewards], dtype=torch.float64)
    centred = r - torch.nanmean(r.view(-1, 4), dim=1).repeat_interleave(4)
    deviation = {"group": nanstd(r.view(-1, 4), dim=1).repeat_interleave(4), "batch": nanstd(r), "none": None}
    for scale, s in deviation.items():
        expected = (centred if s is None else centred / (s + 1e-4)).nan_to_num(0.0)
        torch.testing.assert_close(group_advantages(rewards, 4, scale=scale).double(), expected, rtol=1e-5, atol=1e-6)


def test_an_unscored_sample_does_not_touch_its_group():
    for scale in ("group", "none"):
        for baseline in ("mean", "rloo"):
            options = {"scale": scale, "baseline": baseline}
            three = group_advantages([1.0, 0.0, 0.5], 3, **options)
            four = group_advantages([1.0, None, 0.0, 0.5], 4, **options)
            assert four.tolist() == [three[0], 0, three[1], three[2]]
    four = group_advantages(torch.tensor([NAN, 1, 0, NAN, 3, 5, 5, 5]), 4, scale="batch")
    five = torch.tensor([1.0, 0, 3, 5, 5, 5]).std() + 1e-4
    torch.testing.assert_close(four, torch.tensor([0, 0.5, -0.5, 0, -1.5, 0.5, 0.5, 0.5]) / five)


def test_a_group_without_a_baseline_has_no_advantage():
    assert group_advantages([None, 5.0, None, None, None, None], 2, baseline="rloo").tolist() == [0] * 6


@pytest.mark.parametrize("value", [0.1, -1e6 / 3, 1e-12])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero(value, scale):
    """Not a rounding error divided by epsilon."""
    assert group_advantages([value] * 7, 7, scale=scale).tolist() == [0.0] * 7
    assert zero_variance_groups([value] * 7, 7).tolist() == [True]


@settings(max_examples=50)
@given(rewards=rewards_lists, order=st.permutations(range(4)), shift=st.integers(-5, 5))
def test_invariances(rewards, order, shift):
    """Centred in every group; follows the order; blind to a shift of all rewards; 0 in zero-variance groups only."""
    for baseline in ("mean", "rloo"):
        a = group_advantages(rewards, 4, baseline=baseline).view(3, 4)
        assert a.isfinite().all()
        torch.testing.assert_close(a.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
        moved = group_advantages([rewards[4 * g + i] for g in range(3) for i in order], 4, baseline=baseline)
        torch.testing.assert_close(moved.view(3, 4), a[:, list(order)], rtol=1e-5, atol=1e-6)
        shifted = group_advantages([None if r is None else r + shift for r in rewards], 4, baseline=baseline)
        torch.testing.assert_close(shifted.view(3, 4), a, rtol=1e-4, atol=1e-5)
        assert ((a == 0).all(1) == zero_variance_groups(rewards, 4)).all()


def test_gdpo_equals_trl_normalize_then_sum():
    from trl.trainer.utils import nanstd

    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 12, generator=g, dtype=torch.float64) * torch.tensor([[1.0], [100.0], [0.01]])
    rewards[1, 5] = NAN
    rewards[2, 4:8] = NAN
    rewards[:, 9] = NAN
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    grouped = rewards.T.reshape(3, 4, 3)  # TRL: [prompts, group, functions]
    normalized = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    total = (normalized.reshape(12, 3) * weights).nansum(1)
    total[9] = NAN
    expected = ((total - total.nanmean()) / (nanstd(total) + 1e-4)).nan_to_num(0.0)
    actual = gdpo(rewards.tolist(), 4, weights.tolist())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    as_lists = [[None if math.isnan(x) else x for x in row] for row in rewards.tolist()]
    assert torch.equal(gdpo(as_lists, 4, weights.tolist()), actual)


def test_gdpo_keeps_a_reward_of_small_spread():
    """What it is for: correctness in {0, 1} beside a length reward in the hundreds."""
    correct, length = [1.0, 0, 0, 0], [100.0, 300, 100, 300]
    summed = group_advantages([c + x for c, x in zip(correct, length)], 4)
    assert abs(summed[0] - summed[2]) < 0.01  # correct and wrong at one length: told apart by a hundredth
    a = gdpo([correct, length], 4, [1.0, 1.0])
    assert a[0] - a[2] > 1


def test_the_recipes_lines_equal_group_advantages():
    """Whatever the flags: the total reward, and none of a sample that has none."""
    total = [101.0, 300, None, 300, 5.0, 0.25]
    scores = Scores(total, {"correct": [1.0, 0, None, 0, 1, 1]}, {"correct": 1.0}, [])
    for flags in ({}, {"scale": "none", "baseline": "rloo"}, {"scale": "batch"}, {"baseline": "rloo"}):
        assert torch.equal(composed(scores, 3, Advantage(**flags)), group_advantages(total, 3, **flags))


def test_gdpo_weighs_rewards_as_they_were_scored():
    """A wrong answer in good form must not be reinforced because form counts as much as being right."""
    correct, form = [1.0, 0, 0, 0, 1, 1, 0, 0], [0.0, 1, 0, 1, 1, 0, 0, 1]
    rewards = {"correct": (lambda c, g: correct, 1.0), "format": (lambda c, g: form, 0.1)}
    advantages = composed(score(rewards, [""] * 8, [""] * 8), 4, Advantage(aggregate="gdpo"))
    assert torch.equal(advantages > 0, torch.tensor(correct) > 0)


def test_zero_variance_groups():
    rewards = [1, 1, None, 0, 1, None, None, None, 2, None, None, None, None, 3, 3, 3.5]
    assert zero_variance_groups(rewards, 4).tolist() == [False, True, True, False]


def test_sample_mask():
    completions = [Completion([1], [0.0], truncated) for truncated in (False, True, False, False, True, False)]
    samples = Samples([], 3, completions, [""] * 6, 1)
    scores = Scores([1.0, 1, 1, 0, 0, 1], {}, {}, [])
    for flags, kept in (
        ({}, [True] * 6),
        ({"drop_zero_variance": True}, [False] * 3 + [True] * 3),
        ({"mask_truncated": True}, [True, False, True, True, False, True]),
        ({"drop_zero_variance": True, "mask_truncated": True}, [False] * 3 + [True, False, True]),
    ):
        assert sample_mask(Advantage(**flags), scores, samples).tolist() == kept


def test_errors():
    with pytest.raises(ValueError, match="group_size is 1"):
        group_advantages([1.0, 0.0], 1)
    with pytest.raises(ValueError, match=r"rewards is \[3\].*group_size 2"):
        group_advantages([1.0, 0.0, 1.0], 2)
    with pytest.raises(ValueError, match="rewards is"):
        zero_variance_groups([], 2)
    with pytest.raises(ValueError, match="infinity"):
        group_advantages([1.0, float("inf")], 2)
    with pytest.raises(ValueError, match="scale is 'std'"):
        group_advantages([1.0, 0.0], 2, scale="std")
    with pytest.raises(ValueError, match="baseline is 'median'"):
        group_advantages([1.0, 0.0], 2, baseline="median")
    for fields, flag in (({"scale": "none"}, "--scale none"), ({"baseline": "rloo"}, "--baseline rloo")):
        with pytest.raises(ValueError, match=f"{flag} .*--aggregate gdpo"):
            Advantage(aggregate="gdpo", **fields).check()
        Advantage(**fields).check()
