"""The batcher under load, faults and mutants: rows N9, E1, E3, E4, E5, E6, E8, E9, E11 of the list of faults.

Every test of a promise has a control beside it: the same measurement on a batcher with a planted bug, which must be seen.
Counts are 1:20 here; `pytest -m soak` runs them in full."""
import asyncio
import gc
import itertools
import math
import random
import threading
import time
import weakref

import hypothesis.internal.conjecture.optimiser  # noqa: F401 - pytest parses it when it is first needed; before CPython 3.11.8 that fails while a thread parses (gh-106905)
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlserve.errors import DeadlinePassed, ModelFailed, Unavailable
from mlserve.serving.batching import execution as batch_module
from mlserve.serving.batching import scheduler as batcher_module
from mlserve.serving.batching import queue as queue_module
from mlserve.serving.batching.answers import OpenRequests
from mlserve.serving.batching.execution import Broken, DeviceLost, Job, Runner, run_jobs
from mlserve.serving.batching.scheduler import Batcher
from mlserve.serving.observability.logging import trace

SCALE = pytest.mark.parametrize("scale", [pytest.param(20, id="1in20"), pytest.param(1, id="full", marks=pytest.mark.soak)])
MODES = pytest.mark.parametrize("options", [{}, {"threads": 2}, {"inline": True}, {"threads": 2, "max_delay_ms": 0.5}],
                                ids=["thread", "threads", "inline", "delay"])
FACTOR = 0x9E3779B97F4A7C15 % 2**63


def answer(x):
    "What the fake answers to each number, bit for bit, whatever stands beside it"
    return (x.astype("u8") * np.uint64(FACTOR)) ^ np.uint64(0x5555)


def fake(inputs):
    return {"y": answer(inputs["x"])}


def tagged(tag, rows=1, width=2):
    "A request whose every number is its own"
    return {"x": (np.arange(rows * width, dtype="u8") + np.uint64(tag * 64)).reshape(rows, width)}


def right(arrays, result):
    return result is not None and result["y"].shape == arrays["x"].shape and bool((result["y"] == answer(arrays["x"])).all())


class Gate:
    "A model that waits to be let through, and remembers what it ran"
    def __init__(self, predict=fake):
        self.open, self.entered, self.predict, self.ran, self.calls = threading.Event(), threading.Event(), predict, set(), 0

    def __call__(self, inputs):
        self.calls += 1
        self.ran |= {int(t) // 64 for t in inputs["x"][:, 0]}
        self.entered.set()
        assert self.open.wait(30)
        return self.predict(inputs)


async def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.001)


async def blocked(gate, **options):
    "A batcher whose one thread is inside the model, with request 0; what is handed in now waits"
    b = Batcher(gate, **options)
    first = asyncio.create_task(b.submit(tagged(0), key=0))
    await until(gate.entered.is_set)
    return b, first


# E4: no mix-up

async def tally(b, n, in_flight=64, seed=0):
    "Answers that were not the function of their own input, in `n` answers at the given concurrency"
    rng, wrong, done, tags = random.Random(seed), 0, 0, itertools.count()
    requests = [tagged(tag, rng.choice((1, 1, 1, 2, 3)), rng.choice((1, 2, 2, 2))) for tag in range(4093)]  # far more than are under way
    requests = [(r, len(r["x"]), r["x"].shape[1], answer(r["x"]).tobytes()) for r in requests]
    finished = asyncio.get_running_loop().create_future()

    def send():
        arrays, rows, key, expected = requests[next(tags) % 4093]

        def answered(result, error):
            nonlocal wrong, done
            wrong += error is not None or result["y"].tobytes() != expected
            done += 1
            if done + in_flight <= n:
                send()
            elif done == n:
                finished.set_result(None)
        b.submit_nowait(arrays, rows, key, answered)
    for _ in range(in_flight):
        send()
    await finished
    assert await b.close(5) == 0
    return wrong


@SCALE
@MODES
def test_E4_no_answer_is_mixed_up(scale, options):
    n = 1_000_000 // scale
    b = Batcher(fake, **options)
    assert asyncio.run(tally(b, n)) == 0
    assert b.stats.requests == n and b.stats.batches < n / 4, "batches were formed"


@pytest.mark.parametrize("where", ["split", "reused"])
def test_E4_control_shifted_rows_and_a_buffer_used_again_are_seen(where, monkeypatch):
    if where == "split":
        good = batch_module.split_answer

        def shifted(outputs, jobs, *more):
            good({k: np.roll(v, 1, 0) for k, v in outputs.items()} if len(jobs) > 1 else outputs, jobs, *more)
        monkeypatch.setattr(batch_module, "split_answer", shifted)
        model = fake
    else:
        space = np.empty((256, 2), "u8")

        def model(inputs):
            x = inputs["x"]
            out = space[:len(x), :x.shape[1]]
            out[...] = answer(x)
            return {"y": out}
    if where == "reused":  # answers are looked at only later, as a slow client does
        async def late():
            b, kept = Batcher(model), []
            for i in range(64):
                arrays = tagged(i)
                kept.append((arrays, await b.submit(arrays)))
            await b.close(1)
            return sum(not right(*pair) for pair in kept)
        assert asyncio.run(late()) > 0
    else:
        assert asyncio.run(tally(Batcher(model), 2000)) > 0


def test_E4_an_answer_stays_valid_after_later_batches():
    def identity(inputs):
        return {"y": inputs["x"]}

    async def late():
        b, kept = Batcher(identity), []
        for start in range(0, 640, 64):
            requests = [tagged(i) for i in range(start, start + 64)]
            kept += zip(requests, await asyncio.gather(*[b.submit(r) for r in requests]))
        await b.close(1)
        return all((r["x"] == a["y"]).all() for r, a in kept)
    assert asyncio.run(late())


# E1: poison, and batched = unbatched

POISON = np.uint64(2**62)


def touchy(inputs):
    if (inputs["x"] >= POISON).any():
        raise ValueError("poison")
    return fake(inputs)


def poisoned(arrays):
    arrays["x"][len(arrays["x"]) // 2] += POISON
    return arrays


request = st.tuples(st.integers(1, 7), st.sampled_from([1, 3]), st.booleans(), st.booleans(), st.booleans())


@settings(max_examples=150, deadline=None)
@given(requests=st.lists(request, min_size=1, max_size=24), order=st.randoms(use_true_random=False), max_batch=st.integers(1, 9),
       threads=st.integers(1, 3), inline=st.booleans(), delay=st.sampled_from([0, 1]))
def test_E1_E4_batched_is_unbatched_for_any_arrival(requests, order, max_batch, threads, inline, delay):
    "Rows, shapes, poison, clients that leave, pauses, in any order: each answer is that of a solo run"
    order.shuffle(requests)

    async def go():
        b, tasks = Batcher(touchy, max_batch=max_batch, threads=threads, inline=inline, max_delay_ms=delay), []
        for tag, (rows, width, bad, leaves, pause) in enumerate(requests):
            arrays = tagged(tag, rows, width)
            tasks.append((arrays, bad, leaves, asyncio.create_task(b.submit(poisoned(arrays) if bad else arrays))))
            if pause:
                await asyncio.sleep(0)
            if leaves:
                tasks[order.randrange(len(tasks))][3].cancel()
        outcomes = await asyncio.gather(*[t for *_, t in tasks], return_exceptions=True)
        assert await b.close(5) == 0 and b.pending == 0 and not b.open
        for (arrays, bad, _, task), outcome in zip(tasks, outcomes):
            if task.cancelled():
                continue
            assert isinstance(outcome, ModelFailed) if bad else right(arrays, outcome)
        assert b.stats.requests + b.stats.cancelled <= len(requests)
    asyncio.run(go())


def poison_rounds(n, seed=1):
    "Batches of 2 to 64 with one bad request: how many mates were not as alone, and how many bounds were broken"
    rng, hurt, over = random.Random(seed), 0, 0
    for _ in range(n):
        size = rng.randint(2, 64)
        bad = rng.randrange(size)
        jobs = [Job(poisoned(tagged(i)) if i == bad else tagged(i), 1) for i in range(size)]
        runner = Runner(touchy, 64)
        run_jobs(runner, jobs)
        hurt += sum(not right(j.arrays, j.result) for i, j in enumerate(jobs) if i != bad) + (not isinstance(jobs[bad].error, ModelFailed))
        over += runner.calls > 2 * math.log2(size) + 1
    return hurt, over


@SCALE
def test_E1_poison_fails_alone_within_the_bound(scale):
    assert poison_rounds(10_000 // scale) == (0, 0)


def test_E1_control_a_batch_that_fails_as_a_whole_is_seen(monkeypatch):
    def all_fail(runner, jobs, error, halved):
        for j in jobs:
            j.error = ModelFailed("all")
    monkeypatch.setattr(batch_module, "_settle", all_fail)
    assert poison_rounds(20)[0] > 0


def test_E1_control_running_each_alone_is_over_the_bound(monkeypatch):
    def one_by_one(runner, jobs, error, halved):
        for j in jobs:
            if len(jobs) > 1:
                batch_module._solve(runner, [j])
            else:
                j.error = ModelFailed("alone")
    monkeypatch.setattr(batch_module, "_settle", one_by_one)
    assert poison_rounds(20)[1] > 0


def test_E1_through_the_batcher_and_the_cause_is_kept_for_the_log():
    async def go():
        gate = Gate(touchy)
        b, first = await blocked(gate)
        requests = [tagged(i) for i in range(1, 33)]
        poisoned(requests[9])
        tasks = [asyncio.create_task(b.submit(r, key=0)) for r in requests]
        await until(lambda: b.pending == 32)
        gate.open.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        await b.close(1)
        assert all(right(r, o) for i, (r, o) in enumerate(zip(requests, outcomes)) if i != 9)
        assert isinstance(outcomes[9], ModelFailed) and isinstance(outcomes[9].__cause__, ValueError)
        assert "in touchy" in trace(outcomes[9])
        assert gate.calls - 1 <= 2 * math.log2(32) + 1 and b.stats.failed == 1
    asyncio.run(go())


def test_E1_two_bad_requests_and_a_failure_that_does_not_come_back():
    for bad in itertools.combinations(range(9), 2):
        jobs = [Job(poisoned(tagged(i)) if i in bad else tagged(i), 1) for i in range(9)]
        run_jobs(Runner(touchy, 64), jobs)
        assert [i for i, j in enumerate(jobs) if j.error] == list(bad)
    for size in range(2, 20):
        failures = iter([True])

        def once(inputs):
            if next(failures, False):
                raise ValueError("just now")
            return fake(inputs)
        jobs = [Job(tagged(i), 1) for i in range(size)]
        run_jobs(Runner(once, 64), jobs)
        assert all(right(j.arrays, j.result) for j in jobs), "nobody failed alone, so nobody fails"


# E3: an answer that is not the contract's

WRONG = {"fewer": lambda y: {"y": y[:-1]}, "more": lambda y: {"y": np.concatenate([y, y[:1]])}, "type": lambda y: {"y": y.astype("f8")},
         "name": lambda y: {"z": y}, "missing": lambda y: {}, "nothing": lambda y: None}


async def broken(wrong):
    faults, gate = [], Gate(lambda inputs: WRONG[wrong](answer(inputs["x"])) if len(inputs["x"]) > 1 else fake(inputs))
    b, first = await blocked(gate, expected={"y": np.dtype("u8")}, on_fault=faults.append)
    requests = [tagged(i) for i in range(1, 9)]
    tasks = [asyncio.create_task(b.submit(r, key=0)) for r in requests]
    await until(lambda: b.pending == 8)
    gate.open.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert right(tagged(0), await first)
    after = await b.submit(tagged(99), key=0)
    await b.close(1)
    return requests, outcomes, faults, b, right(tagged(99), after)


@pytest.mark.parametrize("wrong", WRONG)
def test_E3_a_wrong_answer_fails_the_whole_batch_and_is_told(wrong):
    _, outcomes, faults, b, after = asyncio.run(broken(wrong))
    assert all(isinstance(o, Broken) and o.status == 500 for o in outcomes) and len(outcomes) == 8
    assert len(faults) == 1 and isinstance(faults[0], Broken) and b.broken is faults[0] and after


def test_E3_control_without_the_check_the_fault_is_seen(monkeypatch):
    monkeypatch.setattr(batch_module, "check", lambda *_: None)
    requests, outcomes, faults, *_ = asyncio.run(broken("fewer"))
    assert not faults and not all(isinstance(o, dict) and right(r, o) for r, o in zip(requests, outcomes))


def test_E3_a_golden_request_on_the_same_path_finds_rows_in_a_wrong_order():
    "No check of shapes can see it; the golden answer does, in company, as real requests are"
    async def go(model):
        gate = Gate(model)
        b, first = await blocked(gate)
        tasks = [asyncio.create_task(b.submit(tagged(i), key=0)) for i in range(1, 9)]
        await until(lambda: b.pending == 8)
        gate.open.set()
        golden = (await asyncio.gather(*tasks))[3]
        await first
        await b.close(1)
        return right(tagged(4), golden)
    assert asyncio.run(go(fake))
    assert not asyncio.run(go(lambda inputs: {"y": answer(inputs["x"])[::-1]}))


# N9: clients that leave

async def departures(n, seed=2):
    "Rounds of 50 waiting requests, of which many leave, until `n` have left: what was wrong"
    rng, wrong, left = random.Random(seed), [], 0
    while left < n:
        gate = Gate()
        b, first = await blocked(gate, max_batch=8)
        answered, tickets = {}, {}
        for i in range(1, 51):
            tickets[i] = b.submit_nowait(tagged(i), 1, i % 2, lambda r, e, i=i: answered.setdefault(i, []).append(r))
        gone = set(rng.sample(range(1, 51), rng.randint(1, 50)))
        if not all(tickets[i].cancel() for i in gone) or any(tickets[i].cancel() for i in gone):
            wrong.append("cancel tells whether there was something to cancel")
        left += len(gone)
        if b.pending != 50 - len(gone):
            wrong.append("the queue still holds them")
        gate.open.set()
        await first
        if await b.close(5):
            wrong.append("something was cut")
        if gate.ran & gone:
            wrong.append("executed")
        if b.stats.cancelled != len(gone) or b.stats.requests != 51 - len(gone):
            wrong.append("counted")
        if set(answered) != set(range(1, 51)) - gone or not all(len(v) == 1 and right(tagged(i), v[0]) for i, v in answered.items()):
            wrong.append("answers")
    return wrong


@SCALE
def test_N9_what_waits_leaves_with_its_client(scale):
    assert not asyncio.run(departures(10_000 // scale))


class Deaf(Batcher):
    "A mutant: a client that leaves is not heard"
    def cancel(self, ticket):
        if ticket.callback is None:
            return False
        ticket.callback = None
        self.open.discard(ticket)
        self.stats.cancelled += 1
        return True


def test_N9_control_a_batcher_that_does_not_listen_is_seen(monkeypatch):
    monkeypatch.setitem(globals(), "Batcher", Deaf)
    wrong = asyncio.run(departures(1))
    assert "executed" in wrong and "the queue still holds them" in wrong


@pytest.mark.parametrize("who", range(8))
def test_N9_one_of_eight_leaves_while_the_batch_runs(who):
    async def go():
        inner, reports = Gate(), []
        gate = Gate(lambda inputs: inner(inputs) if len(inputs["x"]) > 1 else fake(inputs))
        b, first = await blocked(gate, on_batch=reports.append)
        requests = [tagged(i) for i in range(1, 9)]
        tasks = [asyncio.create_task(b.submit(r, key=0)) for r in requests]
        await until(lambda: b.pending == 8)
        gate.open.set()
        await until(inner.entered.is_set)
        tasks[who].cancel()
        await asyncio.sleep(0)
        inner.open.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        await until(lambda: b.stats.batches == 2)
        assert isinstance(outcomes[who], asyncio.CancelledError)
        assert all(right(r, o) for i, (r, o) in enumerate(zip(requests, outcomes)) if i != who)
        assert b.stats.failed == 0 and not b.open and b.running == 0 and len(reports) == 2
        assert (b.stats.cancelled, b.stats.dropped) == (0, 1)
        await b.close(1)
    asyncio.run(go())


def test_N9_a_client_that_left_is_not_run_again_while_a_fault_is_looked_for():
    left, seen = Job(tagged(1), 1), []

    def model(inputs):
        seen.append({int(t) // 64 for t in inputs["x"][:, 0]})
        left.wanted = False
        return touchy(inputs)
    jobs = [left, Job(tagged(2), 1), Job(poisoned(tagged(3)), 1), Job(tagged(4), 1)]
    run_jobs(Runner(model, 8), jobs)
    assert 1 in seen[0] and not any(1 in s for s in seen[1:]) and right(jobs[1].arrays, jobs[1].result) and jobs[2].error


# E5: overload

async def flood(batches, **options):
    "Ten times what the model can: goodput as a part of the peak, highest queue, refusals, answers missing"
    room = 8

    def model(inputs):
        time.sleep(0.004)
        return fake(inputs)
    peak = Batcher(model, max_batch=room)
    start = time.monotonic()
    await tally(peak, room * batches, in_flight=3 * room)
    rate = room * batches / (time.monotonic() - start)
    b = Batcher(model, max_batch=room, queue=32, **options)
    accepted = answered = highest = 0
    refusals = []

    def done(result, error):
        nonlocal answered
        answered += error is None
    start, sent = time.monotonic(), 0
    now, end = 0, batches * 0.004
    while now < end:
        now = min(time.monotonic() - start, end)  # a pause of this process is no pause of its clients
        while sent < 10 * rate * now:
            sent += 1
            try:
                b.submit_nowait(tagged(sent), 1, 0, done)
                accepted += 1
            except Unavailable as e:
                refusals.append(e)
            highest = max(highest, b.pending)
        await asyncio.sleep(0.001)
    goodput = answered / (time.monotonic() - start)
    assert await b.close(5) == 0
    return goodput / rate, highest, refusals, accepted - answered, b


def test_E5_goodput_holds_at_ten_times_the_load():
    best = 0
    for _ in range(5):
        ratio, highest, refusals, missing, b = asyncio.run(flood(60))
        assert highest <= 32 and missing == 0 and b.stats.shed == len(refusals) > 0
        assert all(e.status == 503 and isinstance(e.retry_after, int) and e.retry_after >= 1 for e in refusals)
        best = max(best, ratio)
        if best >= 0.9:
            break
    print(f"goodput at ten times the load: {best:.0%} of the peak")
    assert best >= 0.9


class Endless(Batcher):
    "A mutant: the bound of the queue is not kept"
    def submit_nowait(self, *args, **kw):
        self.queue = math.inf
        return super().submit_nowait(*args, **kw)


def test_E5_control_a_queue_without_bound_is_seen(monkeypatch):
    monkeypatch.setitem(globals(), "Batcher", Endless)
    for _ in range(5):  # a busy machine may send too slowly to fill a queue
        _, highest, refusals, *_ = asyncio.run(flood(10))
        assert not refusals
        if highest > 32:
            break
    assert highest > 32


def test_E5_the_time_to_come_again_follows_the_pace():
    b = Batcher(fake, queue=100, threads=2)
    for pace, rows, seconds in ((0, 0, 1), (0.001, 10, 1), (0.5, 9, 3), (10, 100, 60)):
        b.pace, b.far.rows = pace, rows
        assert b.retry_after() == seconds


# E6, E11: deadlines

async def late(seconds=20):
    "Forty requests wait behind a model that hangs, half of them with a deadline: what ran, and how late each answer was"
    gate = Gate()
    b, first = await blocked(gate, max_batch=4)
    now, lateness, outcomes = time.monotonic(), [], {}

    async def ask(i, deadline):
        try:
            outcomes[i] = await b.submit(tagged(i), key=0, deadline=deadline)
        except DeadlinePassed as e:
            outcomes[i] = e
            lateness.append(time.monotonic() - deadline)
    tasks = [asyncio.create_task(ask(i, now + 0.02 + 0.002 * i if i % 2 else math.inf)) for i in range(1, 41)]
    await until(lambda: len(outcomes) == 20, seconds)
    gate.open.set()
    await asyncio.gather(first, *tasks)
    await b.close(1)
    return gate.ran, outcomes, lateness, b.stats


def test_E6_what_is_late_is_answered_in_time_and_never_run():
    best = math.inf
    for _ in range(5):
        ran, outcomes, lateness, stats = asyncio.run(late())
        assert all(isinstance(o, DeadlinePassed) if i % 2 else right(tagged(i), o) for i, o in outcomes.items())
        assert ran == {0, *range(2, 41, 2)} and stats.expired == 20 and min(lateness) >= 0
        best = min(best, max(lateness))
        if best <= 0.05:
            break
    assert best <= 0.05


@pytest.mark.parametrize("mutant", ["late sweep", "taken"])
def test_E6_control_a_batcher_that_runs_late_work_is_seen(mutant, monkeypatch):
    "Without the sweep nothing answers in time; without the look at the deadline when a batch is taken, late work runs"
    monkeypatch.setattr(OpenRequests, "sweep", lambda self: None)
    if mutant == "late sweep":
        with pytest.raises(AssertionError, match="did not happen"):
            asyncio.run(late(0.5))
        return
    good = queue_module.take

    def careless(queue, free=1, now=None):
        for tickets in queue.waiting.values():
            for t in tickets:
                t.deadline = math.inf
        return good(queue, free, now)
    monkeypatch.setattr(batcher_module, "take", careless)
    assert asyncio.run(expired_when_taken()) == {0, 1, 2}


async def expired_when_taken():
    "Two deadlines pass while the event loop is held, so only the model thread can notice: what ran"
    gate = Gate()
    b, first = await blocked(gate)
    for i in (1, 2):
        b.submit_nowait(tagged(i), 1, 0, lambda r, e: None, time.monotonic() + 0.01)
    time.sleep(0.03)
    gate.open.set()
    time.sleep(0.1)
    await first
    await b.close(0.05)
    return gate.ran


def test_E6_a_model_thread_looks_at_the_deadline_too():
    assert asyncio.run(expired_when_taken()) == {0}


def test_E6_a_deadline_that_passed_before_is_refused_at_once():
    async def go():
        b = Batcher(fake)
        with pytest.raises(DeadlinePassed):
            await b.submit(tagged(1), deadline=time.monotonic() - 1)
        assert b.stats.expired == 1 and b.stats.requests == 0
    asyncio.run(go())


def test_E6_an_answer_in_time_is_an_answer():
    async def go(options):
        b = Batcher(fake, **options)
        outcomes = await asyncio.gather(*[b.submit(tagged(i), deadline=time.monotonic() + 30) for i in range(100)])
        assert all(right(tagged(i), o) for i, o in enumerate(outcomes)) and b.stats.expired == 0
        await b.close(1)
    for options in ({}, {"inline": True}):
        asyncio.run(go(options))


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_E11_the_wall_clock_may_jump(jump, monkeypatch):
    wall = time.time

    async def go():
        gate = Gate()
        b, first = await blocked(gate)
        task = asyncio.create_task(b.submit(tagged(1), key=0, deadline=time.monotonic() + 0.2))
        kept = asyncio.create_task(b.submit(tagged(2), key=0, deadline=time.monotonic() + 60))
        await asyncio.sleep(0)
        monkeypatch.setattr(time, "time", lambda: wall() + jump)
        await asyncio.sleep(0.05)
        assert not task.done() and not kept.done()
        with pytest.raises(DeadlinePassed):
            await task
        gate.open.set()
        await first
        assert right(tagged(2), await kept)
        await b.close(1)
    asyncio.run(go())


# E8, E9: memory and the device

class OutOfMemoryError(RuntimeError):
    "As torch names it"


def cramped(room, error, seen):
    def model(inputs):
        seen.append(len(inputs["x"]))
        if len(inputs["x"]) > room:
            raise error
        return fake(inputs)
    return model


@pytest.mark.parametrize("error", [MemoryError(), OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")], ids=["E8", "E9", "E8-torch"])
def test_E8_E9_memory_runs_out_and_a_half_fits(error):
    seen, freed = [], []
    jobs = [Job(tagged(i), 1) for i in range(16)]
    assert run_jobs(Runner(cramped(8, error, seen), 64, free_memory=lambda: freed.append(1)), jobs) is None
    assert all(right(j.arrays, j.result) for j in jobs) and seen == [16, 8, 8] and freed == [1]


def test_E8_E9_halved_once_and_no_further():
    seen = []
    jobs = [Job(tagged(i), 1) for i in range(16)]
    run_jobs(Runner(cramped(4, MemoryError(), seen), 64), jobs)
    assert all(isinstance(j.error, Unavailable) for j in jobs) and seen == [16, 8, 8]
    seen.clear()
    alone = Job(tagged(1, rows=16), 16)
    run_jobs(Runner(cramped(8, MemoryError(), seen), 64), [alone])
    assert right(alone.arrays, alone.result) and seen == [16, 8, 8]


def test_E9_a_wrapped_error_is_recognised():
    def model(inputs):
        try:
            raise OutOfMemoryError("CUDA out of memory.")
        except OutOfMemoryError as e:
            raise ModelFailed("The device has no memory left.") from e
    job = Job(tagged(1), 1)
    run_jobs(Runner(model, 8), [job])
    assert isinstance(job.error, Unavailable)


def test_E9_a_lost_device_ends_the_work():
    async def go():
        def dead(inputs):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        gate, faults = Gate(dead), []
        b, first = await blocked(gate, max_batch=2, on_fault=faults.append)
        tasks = [asyncio.create_task(b.submit(tagged(i), key=0)) for i in range(1, 9)]
        await until(lambda: b.pending == 8)
        gate.open.set()
        outcomes = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert all(isinstance(o, DeviceLost) and o.status == 503 for o in outcomes)
        assert b.lost in faults and gate.calls == 1 and len(faults) == 1
        with pytest.raises(DeviceLost):
            await b.submit(tagged(9))
        await b.close(0)
    asyncio.run(go())


@pytest.mark.parametrize("fault", [ValueError("bad"), MemoryError(), RuntimeError("CUDA error: unspecified launch failure")], ids=lambda e: type(e).__name__)
def test_N9_a_failure_keeps_nothing_of_its_input(fault):
    "Without the collector: an error that a client is still being told holds no arrays"
    def model(inputs):
        copy = inputs["x"] + np.uint64(1)
        watched.append(weakref.ref(copy))
        raise fault
    watched, job = [], Job(tagged(1, rows=50), 50)
    watched.append(weakref.ref(job.arrays["x"]))
    gc.disable()
    try:
        run_jobs(Runner(model, 64), [job])
        error, job = job.error, None
        assert error.status in (500, 503) and len(watched) >= 2 and not any(ref() is not None for ref in watched)
    finally:
        gc.enable()


# Order, threads, the end

async def order_of_keys():
    "One request of another shape among a stream that never ends: how many of the stream ran before it"
    ran = []

    def model(inputs):
        ran.extend((inputs["x"].shape[1], int(t) // 64) for t in inputs["x"][:, 0])
        time.sleep(0.001)
        return fake(inputs)
    b, waiting, tag = Batcher(model, max_batch=4), True, 0

    def answered(result, error):
        nonlocal waiting
        waiting = False
    for _ in range(300):
        while b.pending < 16:
            tag += 1
            b.submit_nowait(tagged(tag), 1, 2, lambda r, e: None)
        if tag == 16:
            b.submit_nowait(tagged(0, width=3), 1, 3, answered)
            tag += 1
        if not waiting:
            break
        await asyncio.sleep(0.001)
    await b.close(5)
    return ran.index((3, 0)) if not waiting else math.inf


def test_no_shape_starves_another():
    assert asyncio.run(order_of_keys()) <= 16


def test_control_a_queue_that_prefers_the_longest_is_seen(monkeypatch):
    monkeypatch.setattr(queue_module, "_next_key", lambda q, now: (max(q.waiting, key=lambda k: len(q.waiting[k])), 0))
    assert asyncio.run(order_of_keys()) > 16


@pytest.mark.parametrize("inline", [False, True])
def test_where_the_model_runs(inline):
    async def go():
        threads = []

        def model(inputs):
            threads.append(threading.current_thread())
            return fake(inputs)
        prepared = []
        b = Batcher(model, max_batch=4, inline=inline, prepare=lambda: prepared.append(threading.current_thread().name))
        assert right(tagged(1), await b.submit(tagged(1)))
        assert (threads[0] is threading.current_thread()) == inline
        assert right(tagged(2, rows=9), await b.submit(tagged(2, rows=9)))
        assert len(threads) == 4 and threading.current_thread() not in threads[1:], "what is larger than a batch never holds the loop"
        assert prepared == ["MainThread"] * inline + ["model-0"]
        await until(lambda: b.busy_since is None)  # the thread gives the answer before it sits down
        await b.close(1)
        await until(lambda: not any(t.is_alive() for t in threads[1:]))
    asyncio.run(go())


def test_threads_share_what_waits():
    async def go():
        gate = Gate()
        gate.open.set()
        both = threading.Barrier(2, timeout=20)

        def model(inputs):
            both.wait()
            return fake(inputs)
        b = Batcher(model, threads=2, max_batch=64)
        outcomes = await asyncio.gather(*[b.submit(tagged(i), key=0) for i in range(2)])
        assert all(right(tagged(i), o) for i, o in enumerate(outcomes)) and b.stats.batches == 2
        await b.close(1)
    asyncio.run(go())


def test_a_callback_that_raises_hurts_nobody():
    async def go(options):
        told, answers = [], []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))
        b = Batcher(fake, **options)

        def bad(result, error):
            raise RuntimeError("mine")
        for i in range(8):
            b.submit_nowait(tagged(i), 1, 0, bad if i == 3 else lambda r, e, i=i: answers.append(right(tagged(i), r)))
        await until(lambda: len(answers) == 7)
        assert all(answers) and [str(e) for e in told] == ["mine"] and right(tagged(9), await b.submit(tagged(9)))
        await b.close(1)
    for options in ({}, {"inline": True}):
        asyncio.run(go(options))


@pytest.mark.parametrize("options", [{}, {"inline": True}], ids=["thread", "inline"])
def test_a_callback_comes_later_and_once(options):
    async def go():
        b, calls = Batcher(fake, **options), []
        ticket = b.submit_nowait(tagged(1), 1, 0, lambda r, e: calls.append((r, e)))
        assert not calls
        await until(lambda: calls)
        assert not ticket.cancel() and len(calls) == 1 and b.stats.cancelled == b.stats.dropped == 0
        await b.close(1)
    asyncio.run(go())


def test_a_model_that_hangs_is_cut_at_the_end_of_the_grace():
    async def go():
        gate = Gate()
        b, first = await blocked(gate, max_batch=1)
        tasks = [first, *[asyncio.create_task(b.submit(tagged(i), key=0)) for i in range(1, 6)]]
        await until(lambda: b.pending == 5)
        assert b.busy_since <= time.monotonic() and b.running == 1
        assert await b.close(0.05) == 6
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(o, Unavailable) for o in outcomes) and b.pending == 0
        gate.open.set()
        await until(lambda: b.busy_since is None)
        assert gate.ran == {0}
    asyncio.run(go())


def test_a_thread_that_cannot_start_is_told():
    async def go():
        def prepare():
            raise OSError("no")
        faults = []
        b = Batcher(fake, prepare=prepare, on_fault=faults.append)
        with pytest.raises(DeviceLost):
            await b.submit(tagged(1))
        assert len(faults) == 1
    asyncio.run(go())
