"""Workers with limits: whatever a call does, the next one is answered."""

import os
import signal

import pytest

from grpo.errors import UserError
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
    if how == "not JSON":
        return {1, 2}
    return value
"""
MISBEHAVIOUR = {
    "spin": "took more than 0.9 s",
    "power": "took more than 0.9 s",
    "sleep": "took more than 0.9 s",
    "memory": "MemoryError",
    "exit": "exit status 3",
    "leave": "SystemExit: bye",
    "raise": "KeyError: 'no such thing'",
    "large": "its reply was too long",
    "not JSON": "TypeError",
}
SURROUNDINGS = """
import os, sys
import grpo.tasks.answers, grpo.tasks.data, grpo.tasks.rewards, grpo.tasks.sandbox, grpo.tasks.scoring
import grpo.tasks.symbolic, grpo.tasks.tiny

def look(modules, variables):
    return [[name for name in modules if name in sys.modules], [os.environ.get(name) for name in variables]]
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


def test_a_call_that_misbehaves_loses_its_own_result_only(sandbox, behave):
    calls = [call for i, how in enumerate(MISBEHAVIOUR) for call in (["return", i], [how, i], ["return", -i])]
    outcomes = sandbox.map(behave, calls)
    for (how, value), outcome in zip(calls, outcomes):
        if how == "return":
            assert outcome == (value, "", False)
        else:
            assert outcome.value is None
            assert MISBEHAVIOUR[how] in outcome.error, how
            assert not outcome.skipped


def test_any_text_goes_there_and_back(sandbox, behave):
    texts = ["", "\n", "\x00", "\ud800", "٣" * 1000, '"', "\\", "x" * 200_000]
    assert [o.value for o in sandbox.map(behave, [["return", t] for t in texts])] == texts
    assert [o.value for o in sandbox.map("builtins:len", [[t] for t in texts] * 40)] == [len(t) for t in texts] * 40
    assert [o.value for o in sandbox.map(behave, [["print", 1]] * 3)] == [1, 1, 1]  # printing is not replying


def test_workers_see_no_secrets_and_no_gpus_and_load_nothing_slow(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    path = tmp_path / "surroundings.py"
    path.write_text(SURROUNDINGS)
    with Sandbox(1, timeout_s=10) as pool:
        modules = ["json", "torch", "transformers", "datasets", "numpy", "pyarrow"]
        outcome = pool.map(f"{path}:look", [[modules, ["SECRET_TOKEN", "CUDA_VISIBLE_DEVICES"]]])[0]
        assert outcome == ([["json"], [None, ""]], "", False)


def test_time_used_up_skips_the_rest(behave):
    with Sandbox(1, timeout_s=0.5, budget_s=0.7) as pool:
        outcomes = pool.map(behave, [["return", 1], *[["spin", 0]] * 2, *[["return", 2]] * 3])
    assert [o.skipped for o in outcomes] == sorted(o.skipped for o in outcomes)
    assert not outcomes[0].skipped
    assert outcomes[-1].skipped
    assert outcomes[-1].error == "not run: the batch had taken 0.7 s"
    assert all(o.value is None for o in outcomes if o.skipped)


def test_a_pool_per_function_and_they_close(behave):
    with Sandbox(2) as pool:
        for _ in range(2):
            assert pool.map(behave, [["return", 5]])[0].value == 5
            assert pool.map("grpo.tasks.answers:last_number", [["7 8"], ["9"]])[0].value == "8"
        processes = [w.process for workers in pool._pools.values() for w in workers]
    assert len(processes) == 4
    assert all(p.poll() is not None for p in processes)
    assert pool.map("grpo.tasks.answers:last_number", []) == []


def test_a_function_that_cannot_be_loaded(behave):
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


def test_a_running_timer_is_paused(sandbox, behave):
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


def test_settings_must_be_positive():
    for wrong in {"workers": 0}, {"timeout_s": 0}, {"memory_mib": 0}, {"budget_s": -1}:
        with pytest.raises(UserError, match=f"{next(iter(wrong))}=.* must all be positive"):
            Sandbox(**wrong)
