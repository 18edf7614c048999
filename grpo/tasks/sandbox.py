"""Worker processes with limits of time and memory, for code that may never come back from untrusted text.

A worker is a fresh interpreter that imports the function and then forks a child, which answers the calls; a child
that overruns is killed and the next one is there in milliseconds. (The training process itself must not fork: it
holds CUDA and threads.) They speak JSON, one line a message, so that nothing a worker says is ever executed or
unpickled here; they see no GPU and none of the environment's secrets; and they never run the main module.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

_START_S = 120.0
"""a worker's start and imports may take so long: a cold disk, a recipe's torch"""
_MAX_REPLY = 1 << 20
_FINISHED = 77
"""exit status of a child whose requests have ended"""
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_COMMAND = """
import json, sys
settings = json.loads(sys.argv[1])
sys.path[:] = settings.pop("path")
from grpo.tasks.sandbox import serve
serve(**settings)
"""


class Outcome(NamedTuple):
    """What became of one call."""

    value: Any
    error: str
    """empty where the call returned; else the last line says why it did not"""
    skipped: bool = False
    """never run: the whole batch's time was used up"""


class Sandbox:
    """Pools of workers, one a function, started at its first `map`; closed with the object or a `with` block.

    workers: of a pool, each of about 80 MB for math-verify; None: half of the cores, at most 4. timeout_s: wall clock
    of one call, seconds; the default and the kill make a second. memory_mb: address space a call may add to what
    the imports took. budget_s: wall clock of one `map`; what has not begun by then is skipped."""

    def __init__(
        self, workers: int | None = None, *, timeout_s: float = 0.9, memory_mb: int = 512, budget_s: float = 60.0
    ) -> None:
        if workers is None:
            workers = max(1, min(4, (os.cpu_count() or 2) // 2))
        if workers < 1 or timeout_s <= 0 or memory_mb < 1 or budget_s <= 0:
            raise ValueError(f"Sandbox: {workers=}, {timeout_s=}, {memory_mb=}, {budget_s=} must all be positive")
        self.workers = workers
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.budget_s = budget_s
        self._pools: dict[str, list[_Worker]] = {}
        # Not a bound method: the finalizer must not keep the object alive.
        self._finalizer = weakref.finalize(self, _kill_all, self._pools)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers. A later `map` starts new ones."""
        _kill_all(self._pools)

    def map(self, function: str, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """Call the function with each list of arguments; outcomes in the order of `calls`.

        function: "module:name" or "path/to/file.py:name". Arguments and results must be JSON. An interval timer that
        runs (the limit `grpo.tasks.rewards.score` sets) stands still meanwhile.

        Raises RuntimeError, with the worker's traceback, where the function cannot be imported."""
        if not calls:
            return []
        with _timer_paused():
            try:
                return self._map(function, calls)
            except BaseException:
                self.close()  # a worker that still computes would answer the next call's question
                raise

    def _map(self, function: str, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        end: float | None = None  # the budget begins with the first call, not with the imports
        pool = self._pools.setdefault(function, [])
        while len(pool) < self.workers:
            pool.append(_Worker(function, self.memory_mb))
        while waiting or any(worker.task is not None for worker in pool):
            for worker in pool:
                if waiting and worker.idle:
                    end = end or time.monotonic() + self.budget_s
                    worker.call(waiting[0], calls[waiting.popleft()], self.timeout_s)
            for worker in _ready(pool):
                task = worker.task
                outcome = worker.proceed(function, self.timeout_s)
                if task is not None and outcome is not None:
                    outcomes[task] = outcome
                if worker.gone:
                    pool[pool.index(worker)] = _Worker(function, self.memory_mb)
            if end is not None and time.monotonic() > end:
                waiting.clear()
        skipped = Outcome(None, f"not run: the batch had taken {self.budget_s:g} s", skipped=True)
        return [outcome or skipped for outcome in outcomes]


class _Worker:
    """The parent's end of one worker: its child starts, is idle, computes a task, and after a kill starts anew."""

    def __init__(self, function: str, memory_mb: int) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _COMMAND,
                json.dumps({"path": sys.path, "target": function, "memory_mb": memory_mb}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # a Ctrl-C is the parent's business; and one signal ends worker and child
        )
        assert self.process.stdin
        assert self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.child: int | None = None
        """process id; None while it starts"""
        self.task: int | None = None
        """index of the call it computes"""
        self.deadline = time.monotonic() + _START_S
        """of the start or the call"""
        self.gone = False
        self.buffer = b""

    @property
    def idle(self) -> bool:
        return self.child is not None and self.task is None

    def call(self, task: int, arguments: Sequence[Any], timeout_s: float) -> None:
        self.task = task
        with contextlib.suppress(BrokenPipeError):  # the end of its replies will say so
            self.requests.write(json.dumps({"arguments": arguments, "timeout_s": timeout_s}).encode() + b"\n")
            self.requests.flush()
        self.deadline = time.monotonic() + timeout_s

    def proceed(self, function: str, timeout_s: float) -> Outcome | None:
        """Read what is there, or act on a deadline that has passed. An outcome, if the task came to its end.

        Raises RuntimeError where the worker cannot start."""
        for message in self._messages():
            if "cannot_load" in message:
                raise RuntimeError(f"the sandbox cannot load {function!r}: {message['cannot_load']}")
            if "child" in message:  # a new one: if there was a task, it was the last one's end
                self.child = message["child"]
                if self.task is not None:
                    return self._end(Outcome(None, f"ended its process (exit status {message['last_status']})"))
            elif self.task is not None:
                return self._end(Outcome(message["value"], message["error"]))
        if self.gone:
            self.kill()
            if self.task is None:
                raise RuntimeError(f"the sandbox's worker for {function!r} ended with status {self.process.returncode}")
            return self._end(Outcome(None, "ended its worker"))
        overdue = time.monotonic() >= self.deadline
        if self.child is None:
            if overdue:
                raise RuntimeError(f"the sandbox's worker for {function!r} did not start within {_START_S:g} s")
            return None
        if overdue or len(self.buffer) > _MAX_REPLY:
            os.kill(self.child, signal.SIGKILL)
            self.child, self.buffer = None, b""
            self.deadline = time.monotonic() + _START_S
            return self._end(Outcome(None, f"took more than {timeout_s:g} s" if overdue else "its reply was too long"))
        return None

    def _end(self, outcome: Outcome) -> Outcome:
        self.task = None
        return outcome

    def _messages(self) -> list[dict[str, Any]]:
        if not select.select([self.replies], [], [], 0)[0]:
            return []
        piece = os.read(self.replies.fileno(), 1 << 16)
        self.gone = not piece
        *lines, self.buffer = (self.buffer + piece).split(b"\n")
        messages = []
        for line in lines:
            # Until a new child reports, all there is to read is what its predecessor left, perhaps half a line.
            with contextlib.suppress(ValueError):
                messages.append(json.loads(line))
        if self.child is None:
            messages = [m for m in messages if "value" not in m]
        return messages

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.replies.close()


def _ready(pool: "list[_Worker]") -> "list[_Worker]":
    """Wait until some worker has something to say, or has run out of time; those workers."""
    watched = [worker for worker in pool if not worker.idle]
    patience = max(min(worker.deadline for worker in watched) - time.monotonic(), 0)
    readable = select.select([worker.replies for worker in watched], [], [], patience)[0]
    now = time.monotonic()
    return [worker for worker in watched if worker.replies in readable or now >= worker.deadline]


def _kill_all(pools: dict[str, list[_Worker]]) -> None:
    while pools:
        for worker in pools.popitem()[1]:
            worker.kill()


@contextlib.contextmanager
def _timer_paused() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    delay, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield
    finally:
        if delay:
            signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-3), interval)


# ---------------------------------------------------------------------------------------------- in the worker


def serve(target: str, memory_mb: int) -> None:
    """A worker's life: import the function, then have a child answer calls, and another whenever one has died."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not look like a reply
    logging.disable(logging.CRITICAL)
    try:
        function = _load(target)
    except BaseException:
        _say(replies, {"cannot_load": traceback.format_exc()[-5000:]})
        return
    status = 0
    while status != _FINISHED:
        child = os.fork()
        if child == 0:
            _limit_memory(memory_mb)
            _say(replies, {"child": os.getpid(), "last_status": status})
            _answer(function, replies)
            os._exit(_FINISHED)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _answer(function: Callable[..., Any], replies: IO[bytes]) -> None:
    for line in sys.stdin.buffer:
        message = json.loads(line)
        try:
            _limit_time(message["timeout_s"])
            reply = json.dumps({"value": function(*message["arguments"]), "error": ""})
        except BaseException:  # SystemExit as well, and math-verify's own TimeoutException
            reply = json.dumps({"value": None, "error": traceback.format_exc()[-5000:]})
        signal.alarm(0)
        _say(replies, reply)


def _say(replies: IO[bytes], message: dict[str, Any] | str) -> None:
    """Write one line. It begins with a line break: the last child may have died within its own."""
    replies.write(b"\n" + (message if isinstance(message, str) else json.dumps(message)).encode() + b"\n")
    replies.flush()


def _load(target: str) -> Callable[..., Any]:
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        # As multiprocessing does: under another name than __main__, so that a recipe's main part does not run.
        specification = importlib.util.spec_from_file_location(f"_sandbox_{Path(place).stem}", place)
        if specification is None or specification.loader is None:
            raise ImportError(f"{place} is not a Python file")
        module = importlib.util.module_from_spec(specification)
        sys.modules[specification.name] = module
        specification.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)


def _limit_memory(megabytes: int) -> None:
    """Limit the address space to what the imports took and so much more. Linux only: elsewhere it is not enforced."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _limit_time(seconds: float) -> None:
    """Die some seconds after the parent would have killed this process: it may be gone, or stopped."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = usage.ru_utime + usage.ru_stime
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent + seconds) + 5, hard))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whose action is to end the process, also within C code
    signal.alarm(int(seconds) + 5)
