"""What goes wrong while serving: memory that runs out, and a kernel that takes the device with it."""
import time

import numpy as np
import torch

from gpu.models import CNN, encoder, free
from gpu.proof import loaded
from gpu.refusals import Holder
from gpu.serving import Server, Wire, body_of, packed, tensor_of


def halved(r, kind):
    "A batch that does not fit is run in halves: the answers are those of the CPU"
    from mlserve.serving.batch import Job, Runner
    from mlserve.serving.batch import run as run_jobs
    package = kind.package(r.work)
    model, reference = loaded(package, r.device), loaded(package, "cpu")
    jobs = [Job(kind.rows(1, i), 1) for i in range(64)]
    want = [reference.predict(j.arrays)[kind.output] for j in jobs]
    whole = {k: np.concatenate([j.arrays[k] for j in jobs]) for k in jobs[0].arrays}
    if r.rehearsed("a GPU's memory cannot be limited here: the model itself says that it is out of memory"):
        def predict(arrays):
            if len(next(iter(arrays.values()))) > 40:
                raise torch.OutOfMemoryError("rehearsed")
            return model.forward(arrays)
    else:
        peaks, total = [], torch.cuda.get_device_properties(0).total_memory
        for n in (32, 64):
            free(r)
            torch.cuda.reset_peak_memory_stats()
            model.forward({k: v[:n].copy() for k, v in whole.items()})
            peaks.append(torch.cuda.max_memory_reserved())
        free(r)
        torch.cuda.set_per_process_memory_fraction((peaks[0] + peaks[1]) / 2 / total)
        r.note(f"peak of 32 and of 64 rows: {peaks[0] >> 20} and {peaks[1] >> 20} MiB; allowed is the middle")
        predict = model.forward
    runner = Runner(predict, 64, free_memory=lambda: free(r))
    fault = run_jobs(runner, jobs)
    right = all(j.error is None and np.allclose(j.result[kind.output], w, **package.tolerance) for j, w in zip(jobs, want, strict=True))
    r.row("out of memory, in process", rows=64, calls=runner.calls, out_of_memory=runner.out_of_memory, fault=str(fault), answers_right=right)
    if r.gpu:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return right and runner.out_of_memory == 1


def crowded(r, kind):
    "Another process takes the memory while a server serves: 200 or 503, and 200 again afterwards"
    with Server(r, kind.package(r.work).path, max_batch=32) as server:
        server.ready(90)
        wire, request = Wire(server.port), packed(*body_of(kind, kind.rows(200)))
        with Holder(r, 0) as holder:
            during = [wire.ask(request)[0] for _ in range(3)]
        after = [wire.ask(request)[0] for _ in range(3)]
        r.row("another process takes the memory", left_mib=holder.free, during=during, after=after, alive=server.process.poll() is None)
        return set(during) <= {200, 503} and set(after) == {200}


def lost_kernel(r, kind):
    "A number that no table has: an error of one request on the CPU, a lost device on a GPU"
    rows = kind.rows(1)
    rows["ids"][0, 0] = 10 * kind.words
    with Server(r, kind.package(r.work).path) as server:
        server.ready(90)
        start, wire = time.perf_counter(), Wire(server.port)
        try:
            status = wire.ask(packed(*body_of(kind, rows)))[0]
        except OSError as e:
            status = type(e).__name__
        if r.rehearsed("a CPU is not lost by a wrong index: the request fails alone"):
            after = wire.ask(packed(*body_of(kind, kind.rows(1))))[0]
            r.row("a lost kernel", status=status, afterwards=after)
            return (status, after) == (500, 200)
        code, said = server.ended(30)
        r.row("a lost kernel", status=status, ended=code, seconds=time.perf_counter() - start, said=str(said)[:300])
        return code == 70


def kept_answers(r):
    "Two hundred answers of a server, one after the other and each its own"
    want = loaded(CNN.package(r.work), "cpu")
    with Server(r, CNN.package(r.work).path) as server:
        server.ready(90)
        wire, far = Wire(server.port), 0.0
        for i in range(r.several(200, 20)):
            rows = CNN.rows(1 + i % 5, i)
            far = max(far, float(abs(tensor_of(wire.ask(packed(*body_of(CNN, rows)))) - want.predict(rows)["logits"]).max()))
        r.row("different inputs", answers=r.several(200, 20), max_abs=far)


def run(r):
    kind, right, cases = encoder(r), 0, (lost_kernel, crowded, halved)
    for case in cases:
        right += bool(r.tried(case, r, kind))
        free(r)
        r.target("mended", right / len(cases))
    r.tried(kept_answers, r)
