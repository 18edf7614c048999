"""Workers with limits: whatever a call does, the next one is answered."""

import os
import random
import signal
import string

import pytest
from conftest import FUZZ_EXAMPLES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from grpo.tasks.answers import MAX_ANSWER
from grpo.tasks.sandbox import Sandbox

BEHAVIOURS = """
import os, sys, time

def behave(how, value):
    if how == "spin":
        while True: pass
    if how == "power":
        return len(str(10**10**10))          # one call in C: no signal handler runs in it
    if how == "sleep":
        time.sleep(1000)
    if how == "memory":
        return len(bytearray(10**11))
    if how == "exit":
        os._exit(3)
    if how == "leave":
        sys.exit("bye")
    if how == "raise":
        raise KeyError("no such thing")
    if how == "print":
        print('{"value": 13, "error": ""}', flush=True)
    if how == "large":
        return "x" * 10**7
    if how == "unserialisable":
        return {1, 2}
    if how == "environment":
        return [os.environ.get("SECRET_TOKEN"), os.environ.get("CUDA_VISIBLE_DEVICES")]
    return value
"""


@pytest.fixture(scope="module")
def behave(tmp_path_factory):
    path = tmp_path_factory.mktemp("sandbox") / "behaviours.py"
    path.write_text(BEHAVIOURS)
    return f"{path}:behave"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2, timeout_s=0.9) as pool:
        yield pool


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("spin", "took more than 0.9 s"),
        ("power", "took more than 0.9 s"),
        ("sleep", "took more than 0.9 s"),
        ("memory", "MemoryError"),
        ("exit", "exit status 3"),
        ("leave", "SystemExit: bye"),
        ("raise", "KeyError: 'no such thing'"),
        ("large", "its reply was too long"),
        ("unserialisable", "TypeError"),
    ],
)
def test_a_call_that_misbehaves_loses_its_own_result_only(sandbox, behave, how, error):
    calls = [["return", i] for i in range(6)]
    calls[2][0] = how
    outcomes = sandbox.map(behave, calls)
    assert [o.value for o in outcomes] == [0, 1, None, 3, 4, 5]
    assert error in outcomes[2].error
    assert [bool(o.error) for o in outcomes] == [i == 2 for i in range(6)]
    assert not any(o.skipped for o in outcomes)


def test_printing_is_not_replying(sandbox, behave):
    assert [o.value for o in sandbox.map(behave, [["print", 1]] * 3)] == [1, 1, 1]


def test_any_text_goes_there_and_back(sandbox, behave):
    texts = ["", "\n", "\x00", "\ud800", "٣" * 1000, '"', "\\", "x" * 200_000]
    assert [o.value for o in sandbox.map(behave, [["return", t] for t in texts])] == texts


def test_workers_see_neither_secrets_nor_gpus(behave, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with Sandbox(1) as pool:
        assert pool.map(behave, [["environment", 0]])[0].value == [None, ""]


def test_time_used_up_skips_the_rest(behave):
    with Sandbox(1, timeout_s=0.5, budget_s=0.7) as pool:
        outcomes = pool.map(behave, [["return", 1], *[["spin", 0]] * 2, *[["return", 2]] * 3])
    assert [o.skipped for o in outcomes] == sorted(o.skipped for o in outcomes)
    assert not outcomes[0].skipped
    assert outcomes[-1].skipped
    assert outcomes[-1].error == "not run: the batch had taken 0.7 s"
    assert all(o.value is None for o in outcomes if o.skipped)


def test_one_pool_serves_several_functions_and_closes(sandbox, behave):
    with Sandbox(2) as pool:
        for _ in range(2):
            assert pool.map(behave, [["return", 5]])[0].value == 5
            assert pool.map("grpo.tasks.answers:last_number", [["7 8"], ["9"]])[0].value == "8"
        processes = [w.process for workers in pool._pools.values() for w in workers]
    assert len(processes) == 4
    assert all(p.poll() is not None for p in processes)
    assert pool.map("grpo.tasks.answers:last_number", []) == []


def test_function_that_cannot_be_loaded(behave):
    with Sandbox(1) as pool:
        with pytest.raises(RuntimeError, match="no attribute 'absent'"):
            pool.map(behave.replace(":behave", ":absent"), [[1]])
        with pytest.raises(RuntimeError, match="No module named 'nowhere'"):
            pool.map("nowhere:f", [[1]])
        assert pool.map(behave, [["return", 1]])[0].value == 1


def test_an_interrupted_map_leaves_no_answer_behind(behave):
    """An exception in the middle (a Ctrl-C, say) must not let the next map read the last one's replies."""
    with Sandbox(1, timeout_s=5) as pool:
        pool.map(behave, [["return", 0]])
        worker = pool._pools[behave][0]
        call = worker.call

        def interrupted(*arguments):
            call(*arguments)
            raise KeyboardInterrupt

        worker.call = interrupted
        with pytest.raises(KeyboardInterrupt):
            pool.map(behave, [["return", "stale"]])
        assert pool.map(behave, [["return", "fresh"]])[0].value == "fresh"


def test_a_worker_that_dies_is_replaced(behave):
    with Sandbox(1) as pool:
        assert pool.map(behave, [["return", 1]])[0].value == 1
        os.killpg(pool._pools[behave][0].process.pid, signal.SIGKILL)
        outcomes = pool.map(behave, [["return", 1], ["return", 2]])
        assert [o.value for o in outcomes] == [None, 2]
        assert outcomes[0].error == "ended its worker"


def test_a_running_timer_stands_still(sandbox, behave):
    fired = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.6)
    try:
        sandbox.map(behave, [["spin", 0]])
        assert not fired
        assert 0 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 0.6
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"timeout_s": 0}, {"memory_mb": 0}, {"budget_s": -1}])
def test_settings_must_be_positive(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sandbox(**wrong)


# ------------------------------------------------------------------------------------------- symbolic equality


@pytest.mark.parametrize(
    ("answer", "ground_truth", "expected"),
    [
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"x^2+2x+1", r"(x+1)^2", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        ("1, -2", "-2, 1", True),
        ("2x+1", "y=2x+1", True),
        ("y = 2x+1", "2x+1", True),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1 & 2\end{pmatrix}", True),
        ("2^{10}", "1024", True),
        (r"2\sqrt{2}", r"\sqrt{12}", False),
        ("x^2+2x+2", "(x+1)^2", False),
        # several answers at once, and equations of anything to the ground_truth
        (r"17\text{ or }18", "18", False),
        (r"18\text{ (or 17)}", "18", False),
        (r"\{17,18\}", "18", False),
        ("17,18", "18", False),
        (r"\pm 18", "18", False),
        ("[17,19]", "18", False),
        (r"x \ge 18", "18", False),
        (r"17 \lor 18", "18", False),
        ("1=18", "18", False),
        ("x=17=18", "18", False),
        ("1,2,3,4", "1,2", False),
        (r"x \in \mathbb{R}", "(1,2)", False),
        (r"18 \approx 17", "18", False),
        (r"17 \equiv 18", "18", False),
        (r"5 \equiv \sqrt{12}", r"2\sqrt{3}", False),
        (r"\sqrt{12}\mod 17", r"2\sqrt{3}", False),
        (r"18 } 17", "18", False),
        (r"\sqrt{12} } or 17 or 19", r"2\sqrt{3}", False),
        (r"\sqrt{12}\text{ (wrong; really five)}", r"2\sqrt{3}", False),
        (r"\sqrt{12}\text{ cm}", r"2\sqrt{3}", True),
        (r"\left\{1,2\right\}", r"\{2,1\}", True),
        # what math-verify drops, or takes for a product
        ("2516_9", "2516_8", False),
        ("2516_{8}", "2516_8", True),
        ("18_8", "18", False),
        ("18 _ 17", "18", False),
        (r"\log_2 8", r"\log_2 8 + 0", True),
        ("BCA", "ABC", False),
        ("C, A, B", "A, B, C", False),
    ],
)
def test_symbolic_equality(patient_sandbox, answer, ground_truth, expected):
    outcome = patient_sandbox.map("grpo.tasks.symbolic:symbolic_equal", [[answer, ground_truth]])[0]
    assert outcome.error == ""
    assert outcome.value is expected


@pytest.mark.parametrize(
    ("answer", "ground_truth"),
    [
        ("10^10^10", "18"),
        ("10^{10^{10}}", "18"),
        ("1000000!", "18"),
        (r"\binom{10^9}{10^8}", r"\sqrt{2}"),
        (r"\int_0^{\infty} e^{-x^{x^x}} dx", r"\sqrt{2}"),
        ("(" * 400, "18"),
        (r"\frac{1}{" * 100 + "0" + "}" * 100, "18"),
        ("__import__('os').system('true')", "18"),
    ],
)
def test_what_takes_too_much_is_not_equal(strict_sandbox, answer, ground_truth):
    assert strict_sandbox.map("grpo.tasks.symbolic:symbolic_equal", [[answer, ground_truth]])[0].value is not True


@pytest.fixture(scope="module")
def patient_sandbox():
    """For results that must come, on a busy machine too."""
    with Sandbox(1, timeout_s=20) as pool:
        yield pool


_PIECES = [
    *("^", "{", "}", "_", "\\", "(", ")", "!", "+", "-", "*", "/", "=", ",", ".", "%", "$", "&", "<", ">", "|", "'"),
    *(
        "0",
        "1",
        "9",
        "10",
        "99999",
        "1e9",
        "x",
        "y",
        "n",
        "e",
        "i",
        " ",
        "\n",
        "\x00",
        "\ud800",
        "²",
        "٣",
        "−",
        "∞",
        "🙂",
    ),
    *(r"\frac{", r"\sqrt{", r"\sqrt[9]{", r"\boxed{", r"\text{", r"\left(", r"\right)", r"\int_0^{", r"\sum_{n=1}^{"),
    *(
        r"\lim_{x\to",
        r"\prod_{n=1}^{",
        r"\binom{",
        r"\pi",
        r"\infty",
        r"\cdot",
        r"\pm",
        r"\in",
        r"\cup",
        r"\\",
        r"\sin",
    ),
    *(r"\begin{pmatrix}", r"\end{pmatrix}", r"\log_", r"\%", "</answer>", "<answer>", "</reasoning>", "__import__"),
]


def hostile_text() -> st.SearchStrategy[str]:
    """Any text; LaTeX in pieces; the same piece over and over, up to 100 kB; towers, braces and factorials."""
    piece = st.sampled_from(_PIECES)
    light = [
        st.text(max_size=60),
        st.lists(piece, max_size=20).map("".join),
        st.tuples(piece, piece, st.integers(1, 20_000)).map(lambda t: ((t[0] + t[1]) * t[2])[:100_000]),
    ]
    heavy = st.one_of(
        st.lists(st.sampled_from(["9", "10", "99", "x", "2"]), min_size=2, max_size=8).map("^".join),
        st.tuples(st.sampled_from([r"\frac{1}{", r"\sqrt{", "2^{", "(", r"\left("]), st.integers(1, 300)).map(
            lambda t: t[0] * t[1] + "9" + "}" * t[1]
        ),
        st.integers(1, 10**12).map(lambda n: f"{n}!"),
    )
    return st.one_of(*light * 4, heavy)


@pytest.fixture(scope="module")
def strict_sandbox():
    with Sandbox(2, timeout_s=0.25, budget_s=600) as pool:
        yield pool


@settings(
    max_examples=max(FUZZ_EXAMPLES // 25, 3),
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    texts=st.lists(hostile_text(), min_size=25, max_size=25),
    ground_truth=st.sampled_from(["18", r"\sqrt{12}", "x^2+1"]),
)
def test_fuzz_symbolic_checks_in_workers(strict_sandbox, texts, ground_truth):
    """75 strings in batches of 25; with GRPO_FUZZ_EXAMPLES=10000 as many. None may end, hang or fail the pool: each
    outcome is True, False, or an error within the call's limit."""
    texts = [t[:MAX_ANSWER] for t in texts]  # nothing longer gets this far
    outcomes = strict_sandbox.map("grpo.tasks.symbolic:symbolic_equal", [[t, ground_truth] for t in texts])
    assert all(o.value in (True, False) if not o.error else o.value is None for o in outcomes)
    assert not any(o.skipped for o in outcomes)


def test_many_plain_calls(sandbox):
    rng = random.Random(0)
    texts = ["".join(rng.choices(string.printable, k=50)) for _ in range(300)]
    outcomes = sandbox.map("builtins:len", [[t] for t in texts])
    assert [o.value for o in outcomes] == [50] * 300
