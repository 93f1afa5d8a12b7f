"""What goes wrong while serving: memory that runs out, and a kernel that takes the device with it."""
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from gpu.models import CNN, encoder, free
from gpu.proof import loaded
from gpu.refusals import Holder
from gpu.serving import Server, Wire, body_of, packed, tensor_of


def halved(r, kind):
    "A batch that does not fit is run in halves: the answers are those of the CPU"
    from mlserve.serving.batching.execution import Job, Runner
    from mlserve.serving.batching.execution import run_jobs
    package = kind.package(r.work)
    model, reference = loaded(package, r.device), loaded(package, "cpu")
    jobs = [Job(kind.rows(1, i), 1) for i in range(256)]
    want = [reference.predict(j.arrays)[kind.output] for j in jobs]
    whole = {k: np.concatenate([j.arrays[k] for j in jobs]) for k in jobs[0].arrays}
    if r.rehearsed("a GPU's memory cannot be limited here: the model itself says that it is out of memory"):
        def predict(arrays):
            if len(next(iter(arrays.values()))) > 160:
                raise torch.OutOfMemoryError("rehearsed")
            return model.forward(arrays)
    else:
        peaks, total = [], torch.cuda.get_device_properties(0).total_memory
        for n, peak in ((128, torch.cuda.max_memory_reserved), (256, torch.cuda.max_memory_allocated)):  # what suffices, and what is needed
            free(r)
            torch.cuda.reset_peak_memory_stats()
            model.forward({k: v[:n].copy() for k, v in whole.items()})
            peaks.append(peak())
        free(r)
        torch.cuda.set_per_process_memory_fraction((peaks[0] + peaks[1]) / 2 / total)
        r.note(f"128 rows took {peaks[0] >> 20} MiB, 256 need {peaks[1] >> 20}; allowed is the middle")
        predict = model.forward
    runner = Runner(predict, 256, free_memory=lambda: free(r))
    fault = run_jobs(runner, jobs)
    right = all(j.error is None and np.allclose(j.result[kind.output], w, **package.tolerance) for j, w in zip(jobs, want, strict=True))
    r.row("out of memory, in process", rows=256, calls=runner.calls, out_of_memory=runner.out_of_memory, fault=str(fault), answers_right=right)
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
    "Many clients at once, each with rows of its own, so that batches go out behind each other: whose answer is whose"
    reference, clients, each = loaded(CNN.package(r.work), "cpu"), r.several(48, 8), r.several(60, 5)
    asked = [[CNN.rows(1 + (i + c) % 5, 1000 * c + i) for i in range(each)] for c in range(clients)]
    want = [[reference.predict(rows)["logits"] for rows in mine] for mine in asked]
    with Server(r, CNN.package(r.work).path, max_batch=32) as server:
        server.ready(90)

        def client(mine, right):
            wire = Wire(server.port)
            found = [tensor_of(wire.ask(packed(*body_of(CNN, rows)))) for rows in mine]
            return max(float(abs(f - w).max()) for f, w in zip(found, right, strict=True))
        with ThreadPoolExecutor(clients) as threads:
            far = max(threads.map(client, asked, want))
        total, count = (float(re.search(rf"^mlserve_batch_rows_{n}\S* (\S+)", server.get("/metrics"), re.M)[1]) for n in ("sum", "count"))
        r.row("answers of many clients", clients=clients, answers=clients * each, rows_of_a_batch=total / count, max_abs=far)
        return far < 1e-5


def run(r):
    kind, right, cases = encoder(r), 0, (lost_kernel, crowded, halved)
    for case in cases:
        right += bool(r.tried(case, r, kind))
        free(r)
        r.target("mended", right / len(cases))
    if (own := r.tried(kept_answers, r)) is not None:
        r.target("own_answers", float(own))
