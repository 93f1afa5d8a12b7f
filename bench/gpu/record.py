"""What a section found, written as it is found: a section that is killed leaves what it had."""
import json
import threading
import time
import traceback

from mlserve.serving.model.warmup import seconds_of


class Record:
    "Tables, notes and targets of one section"

    def __init__(self, file, work, gpu):
        self.file, self.work, self.gpu, self.device = file, work, gpu, "cuda:0" if gpu else "cpu"
        self.kept, self.error = {"tables": {}, "notes": [], "targets": {}}, None
        self.lock = threading.Lock()

    def _write(self):
        new = self.file.with_suffix(".new")
        with self.lock:
            new.write_text(json.dumps(self.kept | ({"error": self.error} if self.error else {}), default=float))
            new.replace(self.file)

    def row(self, table, **cells):
        "One row more of a table"
        self.kept["tables"].setdefault(table, []).append(cells)
        self._write()

    def note(self, text):
        self.kept["notes"].append(text)
        self._write()

    def target(self, name, value):
        "What was measured for one of the targets"
        self.kept["targets"][name] = value
        self._write()

    def fail(self, error):
        self.error = error
        self._write()

    def tried(self, call, *args):
        "What a call gives, or nothing and its error: one failure does not cost the rest of a section"
        try:
            return call(*args)
        except Exception:
            self.fail("\n".join(filter(None, [self.error, traceback.format_exc()])))

    def rehearsed(self, why):
        "Whether this is the CPU, where the inner call is left out; a note says why"
        if not self.gpu and (note := f"rehearsed: skipped because {why}") not in self.kept["notes"]:
            self.note(note)
        return not self.gpu

    def several(self, many, few):
        "A count: `many` on a GPU, `few` in a rehearsal"
        return many if self.gpu else few


def median(values):
    return sorted(values)[len(values) // 2]


def timed(call, sync, seconds=0.3, least=5):
    "Median seconds of a finished call, after three that do not count"
    for _ in range(3):
        call()
    sync()
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < least or time.perf_counter() < end:
        taken.append(seconds_of(call, sync))
    return median(taken)
