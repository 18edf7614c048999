"""Loading, splitting, filtering and generating questions."""

import csv
import itertools
import json
import logging
import re
from fractions import Fraction
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

import grpo.tasks.data
from grpo.errors import UserError
from grpo.sampler import Question
from grpo.tasks.data import (
    Example,
    arithmetic_examples,
    by_hash,
    check_disjoint,
    countdown_examples,
    drop_long,
    fixed_sample,
    in_held_out,
    load_examples,
    load_questions,
    load_splits,
    question_hash,
    split_questions,
)

ROWS = [
    {"question": f"How many is {i}?", "answer": f"It is {i}.\n#### {i}", "n": {"ground_truth": [i, -i]}}
    for i in range(1, 6)
]
EXAMPLES = [Example(f"How many is {i}?", str(i)) for i in range(1, 6)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_local_file(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", ROWS)
    assert load_examples(path) == EXAMPLES
    assert load_examples(path, limit=2) == EXAMPLES[:2]
    assert load_examples(path, split="test") == EXAMPLES  # a file is taken whole


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_nested_fields_and_field_names(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", ROWS)
    assert [e.ground_truth for e in load_examples(path, answer="n.ground_truth.1")] == ["-1", "-2", "-3", "-4", "-5"]
    dotted = write(tmp_path / f"dotted{suffix}", [{"a.b": "Why?", "c": 1.5}])
    assert load_examples(dotted, question="a.b", answer="c") == [Example("Why?", "1.5")]


def test_folder_with_splits(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:3])
    write(tmp_path / "test.csv", ROWS[3:])
    assert load_examples(str(tmp_path)) == EXAMPLES[:3]
    assert load_examples(str(tmp_path), split="test") == EXAMPLES[3:]
    with pytest.raises(UserError, match=r"holds no validation\.jsonl, \.csv or \.parquet"):
        load_examples(str(tmp_path), split="validation")
    (tmp_path / "dev.jsonl").write_text('{"question": "b"}\n')
    with pytest.raises(UserError, match=r"dev\.jsonl, line 1: no field 'answer'"):
        load_examples(str(tmp_path), split="dev")


def test_the_ground_truth_is_the_final_answer(tmp_path):
    rows = [
        {"question": "a", "answer": "so\n#### 1,000"},
        {"question": "b", "answer": r"so $\boxed{\frac{1}{2}}$"},
        {"question": "c", "answer": 34},
    ]
    assert [e.ground_truth for e in load_examples(write(tmp_path / "x.jsonl", rows))] == ["1,000", r"\frac{1}{2}", "34"]


def test_repeated_questions_are_dropped_and_said(tmp_path, caplog):
    rows = [*ROWS, {"question": "how many  is 3?", "answer": "4"}]
    with caplog.at_level(logging.WARNING):
        assert load_examples(write(tmp_path / "x.jsonl", rows)) == EXAMPLES
    assert "dropped 1 rows that repeat a question" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"question": "b"}',
            r"x\.jsonl, line 2: no field 'answer'; it has 'question'\. .* load_questions\(\.\.\., question=",
        ),
        ('{"question": " ", "answer": 1}', "line 2: field 'question' is empty"),
        ('{"question": "b", "answer": null}', "line 2: field 'answer' is empty"),
        ('{"question": "b", "answer": "so ####"}', "line 2: field 'answer' holds no answer after its mark"),
        ('{"question": "b", ', "line 2: not JSON"),
        ("[1]", "line 2: no field 'question'; it has no fields: it is a list"),
    ],
)
def test_bad_row_is_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "a", "answer": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        load_examples(str(path))


def test_bad_sources(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        load_examples(str(tmp_path / "absent.jsonl"))
    (tmp_path / "data.txt").write_text("x")
    with pytest.raises(UserError, match=r"cannot read a \.txt; use \.jsonl, \.csv or \.parquet"):
        load_examples(str(tmp_path / "data.txt"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no rows"):
        load_examples(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="limit 0 must be at least 1"):
        load_examples("arithmetic", limit=0)
    with pytest.raises(UserError, match='arithmetic has "train" and "test"'):
        load_examples("arithmetic", split="validation")
    with pytest.raises(UserError, match='gsm8k has "train" and "test"'):  # not its training questions instead
        load_examples("gsm8k", split="validation")


def test_unreachable_hub_names_flag_and_remedy(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="--data openai/gsm8k") as error:
        load_examples("gsm8k")
    assert "\n" not in str(error.value)
    assert "or give a folder that holds train.jsonl and test.jsonl" in str(error.value)


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for source in "/no/such/folder", "./no/such", "data/of/mine":
        with pytest.raises(UserError, match=f"--data {source}: no such file or folder"):
            load_examples(source)


def test_hub_sets_and_their_fields(monkeypatch):
    """What is asked of the hub, and how its rows are read. (The hub itself is not asked in tests.)"""
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        rows = {
            "openai/gsm8k": [{"question": "q", "answer": "#### 7"}],
            "DigitalLearningGmbH/MATH-lighteval": [{"problem": "p", "solution": r"$\boxed{x}$", "level": "5"}],
            "open-r1/DAPO-Math-17k-Processed": [{"prompt": f"p{i}", "solution": str(i)} for i in range(200)],
            "someone/mixed": [{"text": "t", "reward_model": {"ground_truth": "5"}}],
        }
        return datasets.Dataset.from_list(rows[name])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_examples("gsm8k", split="test") == [Example("q", "7")]
    assert load_examples("math") == [Example("p", "x")]
    train, test = load_examples("dapo-math"), load_examples("dapo-math", split="test")
    assert len(train) + len(test) == 200
    assert 0 < len(test) < 30
    check_disjoint(train, test)
    options = {"config": "c", "split": "dev", "question": "text", "answer": "reward_model.ground_truth"}
    assert load_examples("someone/mixed", **options) == [Example("t", "5")]
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("DigitalLearningGmbH/MATH-lighteval", "default", "train"),
        ("open-r1/DAPO-Math-17k-Processed", "en", "train"),
        ("open-r1/DAPO-Math-17k-Processed", "en", "train"),
        ("someone/mixed", "c", "dev"),
    ]


# ------------------------------------------------------------------------------------------ splits and filters


def test_hash_is_of_the_words():
    assert question_hash("What is  3+4?\n") == question_hash(" what IS 3+4?")
    assert question_hash("What is 3+4?") != question_hash("What is 3+5?")
    # A known value: splits must be the same on every machine, for ever.
    assert question_hash("What is 3+4?")[:16] == "cba17069b5547edd"


def test_held_out_share():
    keys = [str(i) for i in range(10_000)]
    assert abs(sum(in_held_out(k) for k in keys) / 10_000 - 0.2) < 0.02
    assert sum(in_held_out(k, 0.0) for k in keys) == 0
    assert all(in_held_out(k, 1.0) for k in keys)
    # Shares are nested: what a smaller share holds out, a larger one does too.
    assert all(in_held_out(k, 0.3) for k in keys if in_held_out(k, 0.1))


def test_by_hash_does_not_depend_on_order_or_company():
    examples = [Example(f"q{i}", "1") for i in range(500)]
    train, test = by_hash(examples, "train"), by_hash(examples, "test")
    assert sorted(train + test) == sorted(examples)
    assert by_hash(examples[::-3], "test") == [e for e in examples[::-3] if e in test]


def test_check_disjoint():
    check_disjoint(EXAMPLES[:3], EXAMPLES[3:])
    with pytest.raises(UserError, match=r"1 test questions are training questions too, the first 'HOW many is 2\?"):
        check_disjoint(EXAMPLES, [Example("new", "1"), Example("HOW many is 2? ", "9")])


def asked(examples):
    """The questions of these examples, their prompts as long as their texts."""
    return [Question(e.question, e.ground_truth, encode(e.question)) for e in examples]


def encode(question):
    return list(question.encode())


def test_drop_long(caplog):
    questions = asked(Example("a" * n, "1") for n in (3, 5, 9, 12))
    assert drop_long(questions, 12) == questions
    assert caplog.text == ""
    assert drop_long(questions, 5) == questions[:2]
    assert "dropped 2 of 4 questions of more than 5 prompt tokens (the longest has 12)" in caplog.text
    with pytest.raises(
        UserError, match=r"all 4 .* longer than 2 prompt tokens \(the shortest has 3\); raise --max-prompt-tokens"
    ):
        drop_long(questions, 2)


def test_a_fixed_sample_depends_on_the_questions_alone():
    questions = asked(arithmetic_examples(60))
    sample = fixed_sample(questions, 20)
    assert sample == fixed_sample(questions[::-1], 20)
    assert sample[:5] == fixed_sample(questions, 5)
    assert len({q.text for q in sample}) == 20
    assert sample != questions[:20]  # not the file's beginning
    assert sorted(fixed_sample(questions, 1000)) == sorted(questions)


def test_questions_of_a_recipe(tmp_path):
    """Prompts are encoded once; long ones go before the held-out sample is drawn; the two parts share no question."""
    train = [{"q": f"Train {i}?", "answer": str(i)} for i in range(4)] + [{"q": "x" * 50, "answer": "1"}]
    test = [{"q": f"Test {i}?", "answer": str(i)} for i in range(30)] + [
        {"q": f"{i}" * 50, "answer": "1"} for i in "123"
    ]
    write(tmp_path / "train.jsonl", train)
    write(tmp_path / "test.jsonl", test)
    encoded = []

    def counted(question):
        encoded.append(question)
        return encode(question)

    first, held_out = load_questions(str(tmp_path), counted, max_prompt_tokens=20, held_out=5, question="q")
    assert first == asked(Example(row["q"], row["answer"]) for row in train[:4])
    assert encoded == [row["q"] for row in train + test]
    short = asked(Example(row["q"], row["answer"]) for row in test[:30])
    assert held_out == fixed_sample(short, 5)
    everything = load_questions(str(tmp_path), encode, max_prompt_tokens=20, held_out=100, question="q")[1]
    assert everything == fixed_sample(short, 30)
    with pytest.raises(UserError, match="raise --max-prompt-tokens"):
        load_questions(str(tmp_path), encode, max_prompt_tokens=3, held_out=5, question="q")
    write(tmp_path / "train.jsonl", [*train, test[0]])
    with pytest.raises(UserError, match="1 test questions are training questions too"):
        load_questions(str(tmp_path), encode, max_prompt_tokens=20, held_out=30, question="q")


def test_the_examples_of_docs_data(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text()
    rows = page[page.index("```json\n") + 8 :]
    (tmp_path / "rows.jsonl").write_text(rows[: rows.index("```")])
    assert [e.ground_truth for e in load_examples(str(tmp_path / "rows.jsonl"))] == ["72", "12", r"2\sqrt{3}"]

    def row(text):  # as both calls of load_questions expect it
        nested = {"prompt": [{"content": text}], "reward_model": {"ground_truth": "2"}}
        return {"question": text, "answer": "1", **nested}

    write(tmp_path / "train.jsonl", [row("Train?")])
    write(tmp_path / "test.jsonl", [row("Test?")])
    names = {**vars(grpo.tasks.data), "encode": encode}
    names["args"] = SimpleNamespace(data=str(tmp_path), eval_questions=5)
    names["rollout"] = SimpleNamespace(max_prompt_tokens=256)
    made = []
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(block, names)
        made.append((names["train"], names["held_out"]))
    assert made[:2] == [(asked([Example("Train?", n)]), asked([Example("Test?", n)])) for n in "12"]
    assert [len(part) for part in made[2]] == [2000, 200]


def test_questions_of_generated_examples_keep_their_order():
    examples = countdown_examples(8, numbers=2), countdown_examples(3, numbers=2, split="test")
    assert split_questions(*examples, encode, max_prompt_tokens=500) == (asked(examples[0]), asked(examples[1]))
    train = [Example("a long question", "1"), Example("b?", "2"), Example("a?", "3")]
    assert split_questions(train, EXAMPLES[:1], encode, max_prompt_tokens=14)[0] == asked(train[1:])
    with pytest.raises(UserError, match="1 test questions are training questions too"):
        split_questions(train, train[1:2], encode, max_prompt_tokens=14)


# ------------------------------------------------------------------------------------------------- generated


def value(question):
    expression = question.removeprefix("What is ").removesuffix("?")
    for operation in "+*/-":
        left, found, right = expression.partition(operation)
        if found:
            a, b = Fraction(int(left)), Fraction(int(right))
            return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if operation == "/" else None}[operation]
    raise AssertionError(question)


def test_arithmetic_answers_are_right_and_questions_distinct():
    for operations in "+", "-", "*", "/", "+-*/":
        examples = arithmetic_examples(60, digits=2, operations=operations)
        assert len({e.question for e in examples}) == 60
        assert all(value(e.question) == int(e.ground_truth) for e in examples)
    assert arithmetic_examples(50)[0].question.startswith("What is ")


def test_arithmetic_is_deterministic_in_its_seed():
    assert arithmetic_examples(50, digits=3, seed=1) == arithmetic_examples(50, digits=3, seed=1)
    assert arithmetic_examples(50, digits=3, seed=1) != arithmetic_examples(50, digits=3, seed=2)
    assert arithmetic_examples(20, digits=3, seed=1) == arithmetic_examples(50, digits=3, seed=1)[:20]


def test_arithmetic_splits_are_disjoint_as_sums_and_make_the_whole():
    train, test = arithmetic_examples(split="train"), arithmetic_examples(split="test", seed=5)
    assert len(train) + len(test) == 100
    assert 10 <= len(test) <= 30
    unordered = [{tuple(sorted(e.question[8:-1].split("+"))) for e in part} for part in (train, test)]
    assert not unordered[0] & unordered[1]  # neither 3+4 nor 4+3
    large = [arithmetic_examples(500, digits=6, split=split, seed=s) for s, split in enumerate(("train", "test"))]
    check_disjoint(*large)
    assert load_examples("arithmetic", split="test") == arithmetic_examples(split="test")


def test_arithmetic_operands_have_at_most_so_many_digits():
    operands = [int(x) for e in arithmetic_examples(500, digits=3) for x in e.question[8:-1].split("+")]
    assert 0 <= min(operands) < 100 < 900 < max(operands) <= 999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 101}, r"101 train questions asked, but digits=1 and operations='\+' make only"),
        ({"n": 5, "digits": 0}, r"digits 0 must lie in 1\.\.9"),
        ({"n": 5, "operations": "^"}, "operations '\\^' must be some of"),
        ({"n": 5, "operations": ""}, "operations '' must be some of"),
        ({"n": None, "digits": 4}, "say how many you want"),
    ],
)
def test_arithmetic_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        arithmetic_examples(**arguments)


def solvable(numbers, target):
    """Whether some expression of all the numbers has the value: every pair, every operation, to the end."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        results = {a + b, a - b, a * b} | ({a / b} if b else set())
        if any(solvable([*rest, r], target) for r in results):
            return True
    return False


def test_countdown_puzzles_are_solvable():
    assert solvable([Fraction(n) for n in (3, 3, 8, 8)], 24)
    assert not solvable([Fraction(n) for n in (1, 1, 1)], 7)
    for numbers, count in ((2, 20), (3, 20), (4, 6)):
        examples = countdown_examples(count, numbers=numbers)
        assert len({e.question for e in examples}) == count
        for example in examples:
            target, given = example.ground_truth.split(": ")
            values = [Fraction(n) for n in given.split()]
            assert len(values) == numbers
            assert all(1 <= v <= 99 for v in values)
            assert 1 <= int(target) <= 100
            assert solvable(values, int(target))
            assert example.question.startswith(f"Using the numbers {given.replace(' ', ', ')}, write")
            assert f"equals {target}." in example.question


def test_countdown_splits():
    train, test = (countdown_examples(80, numbers=2, max_number=20, split=split) for split in ("train", "test"))
    assert countdown_examples(80, numbers=2, max_number=20) == train
    assert countdown_examples(80, numbers=2, max_number=20, seed=1) != train

    def key(example):
        target, given = example.ground_truth.split(": ")
        return target, tuple(sorted(given.split()))

    assert not set(map(key, train)) & set(map(key, test))
    assert load_examples("countdown", split="test", limit=5) == countdown_examples(5, split="test")
    with pytest.raises(UserError, match="numbers=1"):
        countdown_examples(5, numbers=1)
    with pytest.raises(UserError, match="could not find 5 different puzzles"):
        countdown_examples(5, numbers=2, max_number=1)


def test_splits_of_a_folder_and_of_a_single_file(tmp_path, caplog):
    write(tmp_path / "train.jsonl", [{"question": f"Train {i}?", "answer": "1"} for i in range(3)])
    write(tmp_path / "test.jsonl", [{"question": "Test?", "answer": "2"}])
    train, test = load_splits(str(tmp_path))
    assert [len(train), len(test)] == [3, 1]
    assert not caplog.records
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(200)]
    file = write(tmp_path / "one.jsonl", rows)
    train, test = load_splits(file)
    assert 2 <= len(test) <= 25
    assert {*train, *test} == set(load_examples(file))
    check_disjoint(train, test)
    assert f"no splits: {len(test)} of its 200 questions are held out" in caplog.text
    shuffled = write(tmp_path / "two.jsonl", rows[::-1])
    assert {*load_splits(shuffled)[1]} == {*test}  # by the question, wherever it stands
    with pytest.raises(UserError, match=r"--data .*: 2 questions are too few.*train\.jsonl and test\.jsonl"):
        load_splits(write(tmp_path / "few.jsonl", [e._asdict() | {"answer": e.ground_truth} for e in train[:2]]))


def test_a_file_called_as_a_known_set_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "arithmetic").write_text("")
    monkeypatch.chdir(tmp_path)
    assert load_splits("arithmetic") == (arithmetic_examples(), arithmetic_examples(split="test"))
