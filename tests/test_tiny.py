"""The tiny model: what it reads, its tokenizer, and its folder: ordinary, made once, whole or not at all."""

import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.policy.chat import encode_chat, stop_ids
from grpo.policy.sources import cache_dir
from grpo.tasks import tiny
from grpo.tasks.data import check_disjoint, in_held_out
from grpo.tasks.rewards import correctness
from grpo.tasks.tiny import Tiny, careful, hasty, pretraining_batch, pretraining_examples, tiny_examples, tiny_model

QUICK = Tiny(steps=2, batch_size=4)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer(Tiny())


def test_careful_working_by_hand():
    working = "<think>5+8=13+0=13, 4+7=11+1=12, 3+6=09+1=10</think><answer>1023</answer>"
    assert careful(345, 678) == working
    assert hasty(345, 678) == "<think></think><answer>345</answer>"


def test_every_line_of_the_working_is_right():
    for step in range(20):
        for question, answer in pretraining_examples(Tiny(careful_share=0.5), 990 + step):
            a, b = map(int, re.findall(r"\d+", question))
            assert correctness([answer], [str(a + b)]) == [float("=" in answer)]
            for x, y, digits, carry, total in re.findall(r"(\d)\+(\d)=(\d\d)\+(\d)=(\d\d)", answer):
                assert int(x) + int(y) == int(digits)
                assert int(digits) + int(carry) == int(total)


def test_styles_come_in_the_shares_asked():
    settings = Tiny(steps=100, batch_size=50)
    thinking = [sum("=" in answer for _, answer in pretraining_examples(settings, s)) / 50 for s in range(100)]
    assert thinking[:80] == [1.0] * 80
    assert 0.25 < sum(thinking[80:]) / 20 < 0.35


def test_nothing_held_out_is_trained_on():
    train, held_out = tiny_examples(300, "train"), tiny_examples(200, "test")
    assert (len(train), len(held_out)) == (300, 200)
    check_disjoint(train, held_out)
    for e in held_out:
        a, b = sorted(map(int, re.findall(r"\d+", e.question)))
        assert (len(str(a)), len(str(b)), str(a + b)) == (3, 3, e.ground_truth)
        assert in_held_out(f"{a}+{b}")
    for step in range(20):
        for question, _ in pretraining_examples(Tiny(), step):
            a, b = sorted(map(int, re.findall(r"\d+", question)))
            assert not in_held_out(f"{a}+{b}")


def test_tokenizer(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    for text in (careful(345, 678), "Grüße, 世界!  tabs\tand\nlines 12345", Tiny().prompt):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    answer = tokenizer.tokenize(careful(345, 678))
    assert answer[0] == "<think>"
    assert [t for t in answer if re.search(r"\d", t)] == re.findall(r"\d", careful(345, 678))
    prompt = encode_chat(tokenizer, "What is 1+1?")
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert prompt[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_targets_are_the_answers(tokenizer):
    settings = Tiny(steps=10, batch_size=20, careful_share=0.5)
    ids, targets = pretraining_batch(settings, tokenizer, 9)
    examples = pretraining_examples(settings, 9)
    assert {"=" in answer for _, answer in examples} == {True, False}
    for row, target, (question, answer) in zip(ids, targets, examples):
        learnt = tokenizer.decode(target[target >= 0])
        assert learnt == answer + "</s>"
        prompt = encode_chat(tokenizer, settings.prompt.format(question=question))
        assert row[: len(prompt)].tolist() == prompt
        assert (target[: len(prompt) - 1] == -100).all()
        at = target >= 0
        assert torch.equal(row[1:][at[:-1]], target[:-1][at[:-1]])  # the next token


def test_folder_is_an_ordinary_model_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    folder = tiny_model(QUICK)
    assert folder.parent == cache_dir()
    assert folder.parent.parent == tmp_path / "a"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert all(m.in_features % 64 == 0 for m in model.modules() if isinstance(m, nn.Linear))
    assert model.config.vocab_size == len(tokenizer)
    assert stop_ids(str(folder), tokenizer) == [tokenizer.eos_token_id]

    monkeypatch.setattr(tiny, "pretrain", None)  # found, not made
    assert tiny_model(QUICK) == folder
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    assert tiny_model(QUICK._replace(seed=1)) != folder
    assert len(list(cache_dir().iterdir())) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    again = tiny_model(QUICK)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_interrupted_making_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_model(QUICK)
    assert list(cache_dir().iterdir()) == []
