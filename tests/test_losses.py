"""The table of losses. The losses themselves are tested as parts of the objective, in test_objective.py."""

from grpo.losses import clip_range


def test_clip_range():
    assert clip_range("grpo") == (0.8, 1.2)
    assert clip_range("grpo", 0.1) == (0.9, 1.1)
    assert clip_range("dapo") == (0.8, 1.28)
    assert clip_range("dapo", None, 0.5) == (0.8, 1.5)
    assert clip_range("cispo") == (0, 5)
    assert clip_range("cispo", 0.1) == (0, 5)
    assert clip_range("cispo", None, 3.0) == (0, 3)
    assert clip_range("reinforce", 0.1, 0.1) == (0, float("inf"))
