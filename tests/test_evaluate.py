"""pass@k, majority votes and standard errors against their definitions; resuming; the command on a tiny model."""

import dataclasses
import itertools
import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
from conftest import write_byte_model

from grpo.errors import UserError
from grpo.policy.chat import load_tokenizer
from grpo.policy.models import Policy, load_policy
from grpo.runs.checkpoint import save_adapter
from grpo.sampler import Completion, Question, Sampling
from grpo.tasks.data import load_splits
from grpo_rollout.programs import evaluate as module
from grpo_rollout.programs.evaluate import (
    Args,
    default_out,
    evaluate,
    main,
    majority,
    mean_and_error,
    pass_at_k,
    summarize,
)
from grpo_rollout.torch.engine import TorchEngine


class FakeEngine:
    """Answers "What is i?" by i or i+1, at random from the seed; token ids are characters. Counts its calls."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.fail_at = fail_at

    def generate(self, prompts, group_size, sampling, *, seed):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((len(prompts), seed))
        rng = random.Random(seed)
        completions = []
        for prompt in prompts:
            number = int(re.search(r"\d+", decode(prompt)).group())
            for _ in range(group_size):
                value = number + rng.randint(0, 1)
                text = rng.choice([f"<answer>{value}</answer>", f"The answer is {value}.00", "I do not know"])
                completions.append(Completion(encode(text), [0.0] * len(text), text == "I do not know"))
        return completions


def encode(text):
    return [ord(c) for c in text]


def decode(ids):
    return "".join(map(chr, ids))


QUESTIONS = [Question(f"What is {i}?", str(i), encode(f"What is {i}?")) for i in range(10, 33)]
SAMPLING = Sampling(max_tokens=20)


# ---------------------------------------------------------------------------------------------------- statistics


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_samples():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    for wrong in ((4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 1)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(*wrong)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["5", "5.0", "$5$", "6", "6"], [True, True, True, False, False], 1.0),  # one number in three spellings
        (["5", "6", "6"], [True, False, False], 0.0),
        (["5", "6"], [True, False], 0.5),
        (["5", "6", "7", "7", "5"], [True, False, False, False, True], 0.5),
        (["5", None, None, None], [True, False, False, False], 1.0),  # no answer, no vote
        ([None, None], [False, False], 0.0),
        (["50%", "50%", "50"], [True, True, True], 1.0),
        ([r"\text{East}", "east", "west"], [True, True, False], 1.0),
    ],
)
def test_majority(answers, correct, expected):
    assert majority(answers, correct) == expected


def test_standard_error_is_numpys():
    np = pytest.importorskip("numpy")
    values = [0.0, 0.25, 1.0, 1.0, 0.5]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert math.isnan(mean_and_error([1.0])[1])


def record(correct, answers):
    return {
        "correct": correct,
        "lenient_correct": [True] * len(correct),
        "answers": answers,
        "lenient_answers": ["1"] * len(correct),
        "truncated": [False] * (len(correct) - 1) + [True],
        "tokens": [10] * len(correct),
    }


def test_summary_of_known_records():
    records = [
        record([True, False, False, False], ["1", "2", "2", None]),
        record([True, True, True, False], ["1", "1", "1", "2"]),
        record([False] * 4, ["3", "3", "3", "3"]),
    ]
    metrics = summarize(records)
    assert metrics["pass_at_1"] == pytest.approx((0.25 + 0.75 + 0) / 3)
    assert metrics["pass_at_2"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert metrics["pass_at_4"] == pytest.approx(2 / 3)
    assert metrics["maj_at_4"] == pytest.approx(1 / 3)
    assert metrics["pass_at_1_se"] == pytest.approx(mean_and_error([0.25, 0.75, 0])[1])  # over questions, not samples
    assert metrics["pass_at_1_lenient"] == metrics["maj_at_4_lenient"] == 1.0
    assert metrics["answered"] == pytest.approx(11 / 12)
    assert metrics["truncated"] == 0.25
    assert metrics["tokens"] == 10
    assert "pass_at_3" not in metrics
    assert {f"pass_at_{k}" for k in (1, 2, 4, 6)} <= summarize([record([True] * 6, ["1"] * 6)]).keys()


# ------------------------------------------------------------------------------------------------------ evaluate


def run(engine, out=None, **options):
    options = {"samples": 4, "seed": 3, "questions_per_batch": 5, "settings": {"model": "m"}} | options
    return evaluate(engine, options.pop("questions", QUESTIONS), SAMPLING, decode, out=out, **options)


def test_records_say_what_was_answered(tmp_path):
    out = tmp_path / "records" / "eval.jsonl"
    seen = []
    result = run(FakeEngine(), out, progress=lambda done, of, metrics: seen.append((done, of, metrics["pass_at_1"])))
    header, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == result.records
    assert header["evaluation"] | {"model": "m", "questions": 23, "samples": 4, "seed": 3} == header["evaluation"]
    assert header["evaluation"]["sampling"] == SAMPLING._asdict()
    assert [s[:2] for s in seen] == [(5, 23), (10, 23), (15, 23), (20, 23), (23, 23)]
    assert seen[-1][2] == result.metrics["pass_at_1"]
    kinds = set()
    for i, line in enumerate(lines):
        assert (line["index"], line["question"], line["ground_truth"]) == (i, *QUESTIONS[i][:2])
        for text, answer, lenient, right, lenient_right, tokens, truncated in zip(
            *(line[k] for k in ("completions", "answers", "lenient_answers", "correct", "lenient_correct")),
            line["tokens"],
            line["truncated"],
        ):
            kinds.add((text[:2], right, lenient_right))
            ground_truth = int(QUESTIONS[i].ground_truth)
            said = re.search(r"\d+", text)
            assert lenient_right == (said is not None and int(said.group()) == ground_truth)
            assert right == (lenient_right and text.startswith("<answer>"))
            assert (answer is not None) == text.startswith("<answer>")
            assert (lenient is None) == truncated == (said is None)
            assert tokens == len(text)
    assert len(kinds) == 5  # right and wrong in both forms, and no answer: all were seen


def test_an_interrupted_evaluation_goes_on_to_the_same_result(tmp_path):
    whole = run(FakeEngine(), tmp_path / "whole.jsonl")
    for fail_at in (0, 1, 3):
        out = tmp_path / f"broken{fail_at}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            run(FakeEngine(fail_at), out)
        with open(out, "a") as file:  # and it died within the next batch
            file.write(json.dumps(whole.records[5 * fail_at]) + '\n{"index": ')
        engine = FakeEngine()
        assert run(engine, out) == whole
        assert len(engine.calls) == 5 - fail_at
        assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    finished = FakeEngine()
    assert run(finished, tmp_path / "whole.jsonl") == whole
    assert finished.calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "was made with seed 3, and now it is 4; give another file, or delete"),
        ({"samples": 2}, "samples 4, and now it is 2"),
        ({"settings": {"model": "other"}}, "model 'm', and now it is 'other'"),
        ({"settings": {"model": "m", "adapter": "a"}}, "adapter None, and now it is 'a'"),
        ({"questions_per_batch": 7}, "batch 5, and now it is 7"),
        ({"questions": [q._replace(prompt=[65, *q.prompt]) for q in QUESTIONS]}, "made with prompts"),
        ({"questions": [q._replace(ground_truth="1") for q in QUESTIONS]}, "made with examples"),
    ],
)
def test_a_file_of_another_evaluation_is_refused(tmp_path, change, message):
    run(FakeEngine(), tmp_path / "e.jsonl")
    before = (tmp_path / "e.jsonl").read_text()
    with pytest.raises(UserError, match=message):
        run(FakeEngine(), tmp_path / "e.jsonl", **change)
    assert (tmp_path / "e.jsonl").read_text() == before


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "e.jsonl").write_text('{"question": "mine"}\n')
    with pytest.raises(UserError, match="exists and is not an evaluation's file"):
        run(FakeEngine(), tmp_path / "e.jsonl")
    assert (tmp_path / "e.jsonl").read_text() == '{"question": "mine"}\n'


def test_seeds_differ_between_batches_and_seeds():
    engine = FakeEngine()
    run(engine)
    run(engine, seed=4)
    seeds = [seed for _, seed in engine.calls]
    assert len(set(seeds)) == len(seeds) == 10


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="no test questions"):
        run(FakeEngine(), questions=[])
    with pytest.raises(UserError, match="--samples 0"):
        run(FakeEngine(), samples=0)


# --------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def args(model_folder, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, first in (("train", 8), ("test", 20)):
        rows = [{"question": f"w{i} w{i + 1}", "answer": f"#### w{i}"} for i in range(first, first + 5)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Args(
        model=model_folder(),
        data=str(folder),
        engine="torch",
        load_in_4bit=False,
        max_tokens=6,
        batch=2,
        samples=3,
        temperature=1.0,
        out=tmp_path / "out.jsonl",
    )


def test_command(args, capsys):
    result = main(args)
    assert [r["question"] for r in result.records] == [f"w{i} w{i + 1}" for i in range(20, 25)]
    assert all(0 < t <= 6 for r in result.records for t in r["tokens"])
    assert "5/5 questions: pass@1" in capsys.readouterr().out
    # Uninterrupted or in two parts, the same; and a second seed answers otherwise.
    text = args.out.read_text()
    args.out.write_text("".join(text.splitlines(keepends=True)[:4]))
    assert main(args) == result
    assert args.out.read_text() == text
    other = main(dataclasses.replace(args, seed=1, out=args.out.with_name("other.jsonl")))
    assert [r["completions"] for r in other.records] != [r["completions"] for r in result.records]


def test_another_adapter_in_the_same_place_or_another_engine_is_another_evaluation(args, tmp_path, monkeypatch):
    args = dataclasses.replace(args, adapter=tmp_path / "adapter")
    policy = load_policy(Policy(args.model, lora_rank=1, load_in_4bit=False))
    save_adapter(policy, tmp_path / "adapter")
    result = main(args)
    assert main(args) == result
    made_with = json.loads(args.out.read_text().splitlines()[0])["evaluation"]
    assert made_with["engine"] == "TorchEngine"
    assert str(tmp_path) not in made_with["adapter_sha256"] + made_with["model_sha256"]

    class OtherEngine(TorchEngine):
        pass

    def make_engine(model, tokenizer, rollout, card):
        return OtherEngine(model, eos_ids=[2], pad_id=tokenizer.pad_token_id)

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_engine", make_engine)
        with pytest.raises(UserError, match="was made with engine 'TorchEngine', and now it is 'OtherEngine'"):
            main(args)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    save_adapter(policy, tmp_path / "adapter")
    before = args.out.read_text()
    with pytest.raises(UserError, match="was made with adapter_sha256"):
        main(args)
    assert args.out.read_text() == before


def test_another_model_in_the_same_place_is_another_evaluation(args, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(args.model, model)
    args = dataclasses.replace(args, model=str(model))
    main(args)
    with open(model / "config.json", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="was made with model_sha256"):
        main(args)


def test_countdown_is_checked_by_its_own_reward(args, tmp_path, monkeypatch):
    """As its recipe does: an expression is right. The ground truth repeated, or its target alone, is not, to either
    reading."""
    said = [
        "<think>40 / 8 is 5, but 64...</think> <answer>40 * 2 * 4 / 64 = 5</answer>",
        "<answer>5: 40 4 64 2</answer>",
        "<answer>5</answer>",
        "40 * 2 * 4 / 64 = 5",
    ]
    model = write_byte_model(tmp_path / "byte-model", "llama", said)
    tokenizer = load_tokenizer(str(model))

    class Player:
        def sync(self, model):
            pass

        def generate(self, prompts, group_size, sampling, *, seed):
            assert "40, 4, 64, 2" in tokenizer.decode(prompts[0])
            return [Completion(tokenizer(text, add_special_tokens=False)["input_ids"], [], False) for text in said]

    monkeypatch.setattr(module, "make_engine", lambda *_: Player())
    result = main(dataclasses.replace(args, model=str(model), data="countdown", limit=1, samples=4))
    (line,) = result.records
    assert line["ground_truth"] == "5: 40 4 64 2"
    assert line["completions"] == said
    assert line["correct"] == line["lenient_correct"] == [True, False, False, False]
    assert line["lenient_answers"] == line["answers"] == ["40 * 2 * 4 / 64 = 5", "5: 40 4 64 2", "5", None]


def test_a_single_file_has_the_parts_that_recipes_train_on_and_hold_out(args, tmp_path, capsys):
    rows = [{"question": f"w{i} w{j}", "answer": f"w{i}"} for i in range(10, 16) for j in range(10, 16)]
    file = tmp_path / "one.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    train, test = load_splits(str(file))
    assert len(train) > 3
    assert test
    args = dataclasses.replace(args, data=str(file))

    def asked(**changes):
        out = args.out.with_name(f"{len(list(tmp_path.iterdir()))}.jsonl")
        return [r["question"] for r in main(dataclasses.replace(args, out=out, **changes)).records]

    assert asked() == asked(training=str(file)) == [e.question for e in test]
    assert f"one.jsonl has no splits: {len(test)} questions of its test part; --split all" in capsys.readouterr().out
    assert asked(split="train", limit=3) == [e.question for e in train[:3]]
    assert asked(split="all") == [r["question"] for r in rows]
    # It is compared with its own train part: data of another set must be named.
    with pytest.raises(UserError, match="test questions are training questions too"):
        asked(split="all", training=str(file))
    with pytest.raises(UserError, match=r"--split validation: .* is a single file; give train, test or all"):
        asked(split="validation")
    file.write_text(json.dumps(train[0]._asdict() | {"answer": "1"}) + "\n")
    with pytest.raises(UserError, match=r"--split test: none of the 1 questions of .* is in it; give --split all"):
        asked()


def test_command_refuses(args, tmp_path):
    with pytest.raises(UserError, match="greedy samples are all the same"):
        main(dataclasses.replace(args, temperature=0.0))
    with pytest.raises(UserError, match=r"--prompt must hold \{question\}"):
        main(dataclasses.replace(args, prompt="Solve this."))
    train = tmp_path / "data" / "train.jsonl"
    with pytest.raises(UserError, match="5 test questions are training questions too"):
        main(dataclasses.replace(args, data=str(train), split="all", training=args.data))
    with pytest.raises(UserError, match=r"--limit 0 must be at least 1"):
        main(dataclasses.replace(args, data=str(train), limit=0))
    with pytest.raises(UserError, match=r"--split all: arithmetic is not a single file"):
        main(dataclasses.replace(args, data="arithmetic", split="all"))
    assert not args.out.exists()


def test_base_and_adapter_have_files_of_their_own(tmp_path, monkeypatch):
    def name(**changes):
        return str(default_out(Args(**{"model": "Qwen/Qwen2.5-3B", **changes})))

    assert name() == "runs/evaluation-Qwen2.5-3B-gsm8k.jsonl"
    assert name(data="open-r1/other") == "runs/evaluation-Qwen2.5-3B-other.jsonl"
    assert name(adapter=Path("runs/mine/adapter")) == "runs/evaluation-mine-gsm8k.jsonl"
    step = Path("runs/mine/checkpoints/step-000100/adapter")
    assert name(adapter=step) == "runs/evaluation-mine-step-000100-gsm8k.jsonl"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "one.jsonl").touch()
    monkeypatch.chdir(tmp_path / "adapter")
    assert name(adapter=Path(), data="../one.jsonl") == f"runs/evaluation-{tmp_path.name}-one.jsonl"
