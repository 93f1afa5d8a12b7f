"""Bugs, planted to see the tests fail: each is the fault of one row of the table of faults, made real in the running code.

`sow` plants one in a server process of the tests; `test_controls.py` plants them in its own process too. The product has no hook for any of this."""
import contextlib
import dataclasses
import importlib
import inspect
import json
import math
import re
import time
import types

MUTATIONS = {}


def plant(f):
    "A bug by its name; `put(where, value)` replaces a thing that must exist"
    MUTATIONS[f.__name__] = f
    return f


def find(where):
    "The owner of a dotted name, the last part of the name, and what it is now"
    parts = where.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(["mlserve", *parts[:n]]))
        except ModuleNotFoundError:
            continue
        for p in parts[n:-1]:
            owner = getattr(owner, p)
        return owner, parts[-1], getattr(owner, parts[-1])
    raise LookupError(where)


def now(where):
    return find(where)[2]


def sow(name, setter=setattr):
    "Plant a bug in this process: for good, or by pytest's `monkeypatch.setattr` for a test"
    def put(where, value):
        owner, attribute, _ = find(where)
        setter(owner, attribute, value)
    MUTATIONS[name](put)


def never(*args, **kw):
    "In place of a check: it finds nothing"


def limits(put, **change):
    good = now("serving.process.worker.limits_of")
    put("serving.process.worker.limits_of", lambda settings: dataclasses.replace(good(settings), **change))


def around(put, where, before=never, after=never):
    "Do something before or after a method"
    good = now(where)

    def wrapped(self, *args):
        before(self, *args)
        found = good(self, *args)
        after(self, *args)
        return found
    put(where, wrapped)


# ---- A: answers, and who gives them


@plant
def an_untold_version_is_1(put):
    good = now("serving.server.read_settings")

    def read(*env):
        settings = good(*env)
        return dataclasses.replace(settings, model_version=settings.model_version or "1")
    put("serving.server.read_settings", read)


# ---- N: the network


@plant
def no_deadline_for_a_head(put):
    limits(put, head=math.inf)


@plant
def every_byte_of_a_head_starts_its_deadline_anew(put):
    def after(self, data):
        if self.phase == now("serving.http.connection.HEAD"):
            self.deadline = self.loop.time() + self.limits.head
    around(put, "serving.http.connection.Connection.data_received", after=after)


@plant
def health_has_no_places_of_its_own(put):
    def before(self, exchange):
        if self.web.crowded:
            raise now("errors.Unavailable")("The server has too many open connections.")
    around(put, "serving.http.connection.Connection._judge", before=before)


@plant
def connections_without_limit(put):
    limits(put, connections=10**6)


@plant
def no_deadline_for_a_body(put):
    limits(put, body=math.inf)


@plant
def no_deadline_for_a_reader(put):
    limits(put, write=math.inf)


@plant
def a_body_is_measured_after_it_was_read(put):
    put("serving.http.request_head.body_limit", lambda h, limits, text=False: (limits.max_body, int(h.get(b"content-length", 0))))


@plant
def only_announced_bodies_are_measured(put):
    def on_body(self, body):
        self.next.body += body
        self.next.length += len(body)
        self.next.held += len(body)
        self.web.budget.receiving += len(body)
    put("serving.http.connection.Connection.on_body", on_body)


@plant
def all_is_inflated_before_it_is_measured(put):
    import zlib

    class Stream:
        def __init__(self, window):
            self.stream = zlib.decompressobj(window)

        def decompress(self, body, limit):
            return self.stream.decompress(body)

        def __getattr__(self, name):
            return getattr(self.stream, name)
    put("wire.json_body.zlib", types.SimpleNamespace(decompressobj=Stream, error=zlib.error))


@plant
def every_chunk_is_kept(put):
    kept = []
    around(put, "serving.http.connection.Connection.on_body", before=lambda self, body: kept.append((self, body)))


@plant
def every_chunk_copies_the_body(put):
    good = now("serving.http.connection.Connection.on_body")

    def on_body(self, body):
        self.next.body = bytes(self.next.body)
        good(self, body)
        self.next.body = bytes(self.next.body)
    put("serving.http.connection.Connection.on_body", on_body)


@plant
def what_is_announced_takes_room(put):
    good = now("serving.http.budget.ByteBudget.reserve")

    def reserve(self, size):
        self.receiving += size
        return good(self, size)
    put("serving.http.budget.ByteBudget.reserve", reserve)


@plant
def a_call_and_its_work_keep_each_other(put):
    good = now("serving.http.inference.Call.finish")

    def finish(self, answer):
        ticket = self.ticket
        good(self, answer)
        self.ticket = ticket
    put("serving.http.inference.Call.finish", finish)


@plant
def a_long_body_takes_what_is_behind_it(put):
    good = now("serving.http.reader.Reader.filled")

    def filled(self, size):
        good(self, size)
        if self.next is None:
            self.transport.set_protocol(now("serving.http.reader.Filling")(self))
    put("serving.http.reader.Reader.filled", filled)


@plant
def a_message_has_all_the_time_there_is(put):
    async def message(context, seconds, place=None):
        return await context.read()
    put("serving.grpc.port._message", message)


@plant
def a_message_is_parsed_whatever_its_size(put):
    put("serving.grpc.calls.head_size", lambda body, most: 0)


@plant
def raw_contents_are_copied(put):
    good, copies = now("serving.grpc.messages.split_message"), []

    def split(body):
        parsed, raw = good(body)
        copies[:] = [bytearray(body), *map(bytearray, raw), *map(bytearray, raw)]
        return parsed, raw
    put("serving.grpc.messages.split_message", split)


def made_otherwise(put, change):
    "Another server of grpcio, by the arguments that ours is made with"
    from grpc import aio
    good, server = now("serving.grpc.port.GrpcPort._made"), aio.server

    def made(self):
        aio.server = lambda options: server(**change(options))
        try:
            return good(self)
        finally:
            aio.server = server
    put("serving.grpc.port.GrpcPort._made", made)


@plant
def grpc_has_connections_without_limit(put):
    made_otherwise(put, lambda options: {"options": [o for o in options if o[0] != "grpc.max_allowed_incoming_connections"]})


@plant
def calls_that_send_nothing_count_as_predictions(put):
    made_otherwise(put, lambda options: {"options": options, "maximum_concurrent_rpcs": 10})


@plant
def a_port_that_ends_stays_closed(put):
    async def nothing(self):
        pass
    put("serving.grpc.port.GrpcPort._keep_open", nothing)


@plant
def any_number_of_messages_may_be_late(put):
    put("serving.grpc.port._place", lambda calls: contextlib.nullcontext())


@plant
def a_message_is_long_after_a_second(put):
    put("serving.grpc.port._short", 1)


@plant
def parts_are_not_counted(put):
    put("serving.grpc.messages._check_count", never)
    put("serving.grpc.messages._most_fields", 10**9)
    put("wire.v2.MOST_ENTRIES", 10**9)


@plant
def who_is_silent_is_waited_for(put):
    async def stop(self, grace):
        self.calls.ended.set()
        await self.server.stop(grace)
        return 0
    put("serving.grpc.port.GrpcPort.stop", stop)


@plant
def one_client_may_take_all_watches(put):
    put("serving.grpc.calls._most_of_one", 64)


@plant
def a_refusal_keeps_its_message(put):
    good, kept = now("serving.grpc.port.answer_infer_call"), []

    def answer(calls, body, caller):
        kept.append(body)
        return good(calls, body, caller)
    put("serving.grpc.port.answer_infer_call", answer)


@plant
def calls_are_cut_when_the_server_stops(put):
    async def stop(self, grace):
        await self.server.stop(0)
        return 0
    put("serving.grpc.port.GrpcPort.stop", stop)


@plant
def the_wrapping_of_chunks_is_not_counted(put):
    put("serving.http.exchange.Exchange.framed", never)


@plant
def chunks_of_any_size(put):
    put("serving.http.exchange._small", 10**9)


@plant
def a_head_without_limit(put):
    limits(put, url=2**30, head_bytes=2**30, headers=10**6)


@plant
def heads_are_taken_as_they_come(put):
    put("serving.http.request_head.fields", lambda pairs, version: dict(pairs))


@plant
def a_lenient_parser(put):
    import httptools

    def parser(connection):
        p = httptools.HttpRequestParser(connection)
        p.set_dangerous_leniencies(**{n: True for n in inspect.signature(p.set_dangerous_leniencies).parameters})
        return p
    put("serving.http.reader.httptools", types.SimpleNamespace(**vars(httptools) | {"HttpRequestParser": parser}))


@plant
def answers_go_out_when_they_are_ready(put):
    put("serving.http.connection.Connection._enqueue", lambda self, e: self._begin(e))


@plant
def an_early_answer_keeps_its_connection(put):
    def before(self, *answer):
        if self.current is not None:
            self.current.keep = True
    around(put, "serving.http.connection.Connection.answer", before=before)


@plant
def what_follows_a_refusal_is_a_request(put):
    "The connection is kept, though the body of the refused request is still to come"
    import httptools

    def refuse(self, error):
        e = self.next
        self._unbuffer(e)
        e.refused, e.keep, e.body = error, True, b""
        self.parser, self.phase, self.deadline = httptools.HttpRequestParser(self), now("serving.http.connection.SILENT"), math.inf
        self._enqueue(e)
    put("serving.http.connection.Connection.refuse", refuse)


@plant
def a_head_must_come_in_one_piece(put):
    import httptools

    def before(self, data):
        if self.phase == now("serving.http.connection.HEAD"):
            self.parser = httptools.HttpRequestParser(self)
    around(put, "serving.http.connection.Connection.data_received", before=before)


@plant
def nobody_hears_a_client_leave(put):
    put("serving.http.inference.Call.cancel", never)


@plant
def other_spellings_are_mended(put):
    import posixpath
    from urllib.parse import unquote
    put("serving.http.request_head.path_of", lambda url, limit=0: posixpath.normpath(unquote(url.partition(b"?")[0].decode("latin-1")).lower().replace("\\", "/").replace("//", "/")
                                                                      .partition(";")[0]).encode())


@plant
def an_administration_route(put):
    good = now("serving.http.app.create_app")

    def create_app(*args):
        app = good(*args)

        async def load(url: str = ""):
            return {"loaded": url}
        app.post("/v2/repository/models/double/load")(load)
        return app
    for room in ("http.app", "process.worker"):
        put(f"serving.{room}.create_app", create_app)


@plant
def json_has_no_limit_of_its_own(put):
    limits(put, max_text=2**30)
    good = now("serving.http.intake.Intake.__init__")

    def init(self, settings, helper=None):
        good(self, settings, helper)
        self.most_text = self.most
    put("serving.http.intake.Intake.__init__", init)


@plant
def the_path_is_chosen_by_what_travels(put):
    "A compressed body is as small as it looks: it is inflated and read on the event loop"
    def at_once(self, route, headers, body, package):
        coding = headers.get(b"content-encoding")
        if len(body) > 2**18 or coding is None:
            return body
        whole = now("wire.json_body.inflate")(body, coding.decode(), self.most)
        self.check_text(route, headers, whole)
        return whole
    put("serving.http.intake.Intake.at_once", at_once)


@plant
def everything_is_read_in_this_process(put):
    put("serving.process.worker.Helper", lambda *args: None)


@plant
def bodies_are_read_as_fast_as_they_come(put):
    def in_turn(self, connection):
        if connection.rest:
            self.loop.call_soon(connection._read_on)
    put("serving.http.listener.Listener.in_turn", in_turn)


@plant
def a_long_body_is_one_array(put):
    put("serving.http.exchange.PIECE", math.inf)


@plant
def what_is_decoded_is_not_counted(put):
    put("serving.http.budget.ByteBudget.take", never)
    put("serving.http.budget.ByteBudget.give", never)


@plant
def parts_of_a_form_are_not_counted(put):
    good = now("serving.http.inference._handle")

    def handle(*args, **kw):
        handled = good(*args, **kw)
        handled.size = 0
        return handled
    put("serving.http.inference._handle", handle)
    put("serving.http.inference.is_text", lambda route, headers: True)


@plant
def a_form_has_any_number_of_parts(put):
    put("wire.form._most", 10**9)


@plant
def the_last_of_two_parts_wins(put):
    put("wire.form.Form._admit", lambda self, name, media, before: self.parts[name])


@plant
def two_waiting_requests_stop_the_reading(put):
    def advance(self):
        if self.current is not None or self.transport.is_closing() or self.flow.write_paused:
            return
        if self.waiting:
            self._begin(self.waiting.popleft())
        if not self.waiting and self.current is None:
            self.flow.resume_reading()
    put("serving.http.connection.Connection._advance", advance)


@plant
def nobody_is_told_to_go_on_later(put):
    def after(self, *args):
        self.owed = False
    around(put, "serving.http.connection.Connection._judge", after=after)


@plant
def an_upgrade_ends_the_request(put):
    def feed(self, data):
        import httptools
        self.fed = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.leave_after()
    put("serving.http.connection.Connection._feed", feed)


@plant
def a_read_is_parsed_to_its_end(put):
    put("serving.http.reader._turn", 10**9)


@plant
def an_application_has_a_say_in_what_is_read(put):
    put("serving.http.exchange._Writing", lambda flow: flow)


@plant
def what_waits_outlives_its_client(put):
    put("serving.http.connection.Connection._drop_waiting", never)


# ---- V: bodies


@plant
def brackets_of_a_long_list_stand_where_they_like(put):
    "The shape of a long list is told by its brackets, wherever its numbers are"
    import re
    put("wire.lists._brackets", lambda text: re.sub(rb"[0-9+.eE\s-]", b"", bytes(text)))


@plant
def json_as_the_standard_library_reads_it(put):
    import orjson
    put("wire.json_body.orjson", types.SimpleNamespace(**vars(orjson) | {"loads": json.loads}))


@plant
def infinity_is_a_number(put):
    json_as_the_standard_library_reads_it(put)
    put("wire.lists.finite", lambda array: True)


@plant
def sizes_are_multiplied_in_64_bits(put):
    import numpy as np
    put("wire.lists.math", types.SimpleNamespace(**vars(math) | {"prod": lambda sizes: int(np.prod(np.array(list(sizes), "i8")))}))


@plant
def shapes_are_believed(put):
    put("wire.v2.claimed_shape", lambda shape, spec: tuple(shape))
    for room in ("tensors", "wire.lists"):
        put(f"{room}.check_shape", never)


@plant
def numbers_are_cast(put):
    "By NumPy's `astype`, which wraps"
    import numpy as np
    invalid = now("errors.InvalidInput")

    def build(flat, shape, spec):
        try:
            return np.array(flat).astype(now("tensors.DATATYPES")[spec.datatype]).reshape(shape)
        except (TypeError, ValueError, OverflowError):
            raise invalid("The value is not a number.") from None
    put("wire.lists._build", build)
    put("wire.lists._quick", never)


@plant
def the_datatype_is_not_compared(put):
    good = now("wire.v2._claim")
    put("wire.v2._claim", lambda e, spec, codec=None: good(e | {"datatype": spec.datatype}, spec, codec))


@plant
def the_last_of_two_wins(put):
    put("wire.v2._entries", lambda o, key, allowed: {e["name"]: e for e in o.get(key, [])})


@plant
def a_codec_is_passed_over(put):
    put("wire.v2._codec", lambda found, what, allowed=(): None)


@plant
def custom_operators_are_taken(put):
    put("package.lite.flatbuffer.check_operator", lambda code: None)


@plant
def a_name_in_the_body_is_not_read(put):
    put("wire.v2._named", lambda o: (None, None))


@plant
def empty_lines_are_skipped(put):
    good = now("wire.rows._lines")
    put("wire.rows._lines", lambda body: good(b"\n".join(line for line in body.splitlines() if line)))


@plant
def a_first_line_that_is_no_row_is_a_header(put):
    good, invalid = now("wire.rows._has_header"), now("errors.InvalidInput")

    def has_header(*args):
        try:
            return good(*args)
        except invalid:
            return True
    put("wire.rows._has_header", has_header)


@plant
def a_text_may_end_its_line(put):
    put("wire.rows._text_line", lambda cells: ",".join(map(str, cells)).encode())


@plant
def texts_end_at_a_nul(put):
    good = now("wire.lists.objects")
    put("wire.lists.objects", lambda items, shape: good([v.split(b"\0")[0] for v in items], shape))


@plant
def a_tensor_is_measured_after_it_was_built(put):
    good, too_large = now("wire.predict.to_array"), now("errors.TooLarge")
    put("wire.lists._check_size", never)

    def to_array(data, spec, limit=2**26, booleans=True):
        found = good(data, spec, 2**60, booleans)
        if found.nbytes > limit:
            raise too_large("The tensor is over the limit.")
        return found
    put("wire.predict.to_array", to_array)


@plant
def the_length_of_a_header_is_believed(put):
    put("wire.v2.split", lambda body, header: (body[:int(header)], memoryview(body)[int(header):]))


@plant
def the_size_of_a_tensor_is_believed(put):
    import numpy as np

    def arrays(claims, rest, limit, booleans):
        found, at = {}, 0
        for spec, shape, size, data, _ in claims:
            dtype = np.dtype(now("tensors.DATATYPES")[spec.datatype])
            found[spec.name] = now("wire.lists.from_flat")(data, shape, spec, limit, booleans) if size is None else np.frombuffer(
                bytes(rest[at:at + size]).ljust(math.prod(shape) * dtype.itemsize, b"\0")[:math.prod(shape) * dtype.itemsize], dtype).reshape(shape)
            at += size or 0
        return found
    put("wire.v2._arrays", arrays)


@plant
def a_name_is_a_path(put):
    "The package is looked for on the disk under the name in the URL"
    from pathlib import Path

    def the_package(life, settings, name, version=None):
        lock = Path(settings.package).parent / name[:80].replace("\0", "") / "package.lock"
        lock.exists() and lock.read_bytes()
        return life.package
    put("serving.http.app.the_package", the_package)


@plant
def an_error_tells_all_it_knows(put):
    "What went wrong, with the traceback, the settings and the environment"
    import os
    import traceback

    def body(error):
        text = f"{error}\n{''.join(traceback.format_exception(error))}"
        while error.__cause__ is not None:
            error = error.__cause__
            text += repr(error)
        return {"error": (text + repr(dict(os.environ)))[-30000:]}
    put("serving.http.exchange.error_body", body)


# ---- E: the model at work


@plant
def a_batch_fails_as_a_whole(put):
    failed = now("errors.ModelFailed")

    def settle(runner, jobs, error, halved):
        for j in jobs:
            j.error = failed("The batch failed.")
    put("serving.batching.execution._settle", settle)


@plant
def what_is_no_number_is_passed_on(put):
    put("wire.json_body.finite", lambda array: True)


@plant
def answers_are_not_checked(put):
    put("serving.batching.execution.check", never)


@plant
def rows_go_to_the_neighbour(put):
    import numpy as np
    good = now("serving.batching.execution.split_answer")

    def split(outputs, jobs, padding=None, counts={}):
        good({k: np.roll(v, 1, 0) for k, v in outputs.items()} if len(jobs) > 1 else outputs, jobs, padding, counts)
    put("serving.batching.execution.split_answer", split)


@plant
def a_queue_without_bound(put):
    good = now("serving.process.loading.Batcher")

    class Endless(good):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            self.queue = math.inf
    put("serving.process.loading.Batcher", Endless)


@plant
def nobody_looks_at_the_deadline(put):
    put("serving.http.inference.deadline", lambda headers, timeout, arrived: math.inf)


@plant
def nobody_watches_the_worker(put):
    put("serving.process.supervisor.hung", lambda *args, **kw: "")


@plant
def the_model_runs_on_the_event_loop(put):
    good = now("serving.process.loading.plan")
    put("serving.process.loading.plan", lambda *args: dataclasses.replace(good(*args), inline=True))
    put("serving.process.worker._too_long", math.inf)


@plant
def memory_errors_are_like_others(put):
    put("serving.batching.execution.out_of_memory", lambda error: False)


@plant
def only_the_outer_error_is_looked_at(put):
    put("serving.model.failures.causes", lambda error: [error])


@plant
def a_lost_device_is_like_others(put):
    put("serving.batching.execution.device_lost", lambda error: False)


@plant
def nobody_watches_the_gpu(put):
    async def watch(*args):
        pass
    put("serving.process.worker.watch_gpu", watch)


@plant
def a_lost_gpu_answers_nobody(put):
    import os
    put("serving.process.gpu_watch.lose_gpu", lambda *args: os._exit(70))


@plant
def every_error_of_cuda_is_the_end(put):
    put("serving.process.loading.computes", lambda probe: False)


@plant
def results_are_not_compared(put):
    put("serving.model.probe._run", lambda probe, factor: [(factor + 1) * i for i in range(1024)])


@plant
def memory_is_believed(put):
    good = now("serving.model.probe.Probe.ask")
    put("serving.model.probe.Probe.ask", lambda self, function, *args: None if function == "cuMemAlloc_v2" and args[1].value > 2**20 else good(self, function, *args))


@plant
def the_dead_are_not_replaced(put):
    put("serving.process.supervisor._ended", never)


@plant
def the_dead_are_replaced_for_ever(put):
    put("serving.process.supervisor._ended", lambda watch, worker, code: None if watch.stopping else watch.start(worker))


@plant
def deadlines_by_the_wall_clock(put):
    offset, wall = time.monotonic() - time.time(), time
    for room in ("scheduler", "answers", "queue"):
        put(f"serving.batching.{room}.monotonic", lambda: wall.time() + offset)


@plant
def a_line_waits_for_its_reader(put):
    import os
    put("serving.observability.logging.write_line", lambda line, to=2: os.write(to, line + b"\n"))


# ---- L: start and stop


@plant
def ready_while_it_loads(put):
    put("serving.state.readiness", never)


@plant
def the_digest_is_not_compared(put):
    good = now("serving.process.loading.open_package")
    put("serving.process.loading.open_package", lambda settings, **kw: good(dataclasses.replace(settings, package_digest=None), **kw))


@plant
def unknown_settings_are_passed_over(put):
    put("settings.unknown_names", lambda env: {})


@plant
def connections_end_with_the_signal(put):
    async def stop(self, grace):
        self.server.close()
        for c in list(self.connections):
            c.transport.abort()
        return 0
    put("serving.http.listener.Listener.stop", stop)


@plant
def who_is_idle_in_the_drain_is_closed_at_once(put):
    good = now("serving.http.listener._wind_up")

    def wind_up(connection, now, begun):
        connection.answered = -math.inf
        return good(connection, now, begun)
    put("serving.http.listener._wind_up", wind_up)


@plant
def the_port_closes_before_the_drain(put):
    good = now("serving.process.worker._drain")

    async def drain(life, listeners, settings, row):
        for listener in listeners:
            await listener.refuse_more()
        return await good(life, listeners, settings, row)
    put("serving.process.worker._drain", drain)


@plant
def the_grace_has_no_end(put):
    good = now("serving.http.listener.Listener.stop")
    put("serving.http.listener.Listener.stop", lambda self, grace: good(self, 1e6))


@plant
def the_parent_waits_for_ever(put):
    put("serving.process.supervisor.Watch.too_late", never)


@plant
def a_signal_waits_for_the_load(put):
    good = now("serving.process.worker.on_signal")
    put("serving.process.worker.on_signal", lambda life, stop: None if life.state == "loading" else good(life, stop))
    put("serving.process.supervisor.Watch.too_late", never)


@plant
def a_second_signal_is_not_heard(put):
    good = now("serving.process.worker.on_signal")
    put("serving.process.worker.on_signal", lambda life, stop: None if life.state == "draining" else good(life, stop))


@plant
def a_worker_outlives_its_parent(put):
    put("serving.process.supervisor._die_with_parent", never)


@plant
def every_request_leaves_64_bytes(put):
    kept = []
    around(put, "serving.http.inference.Call.finish", before=lambda self, answer: kept.append(bytes(24)))


@plant
def some_connections_leave_a_file(put):
    import os
    around(put, "serving.http.listener.Listener.opened", before=lambda self, connection: os.dup(2))


@plant
def some_connections_leave_a_thread(put):
    import threading
    around(put, "serving.http.listener.Listener.opened", before=lambda self, connection: threading.Thread(target=time.sleep, args=(60,), daemon=True).start())


# ---- A: right answers


@plant
def rows_are_asked_beside_rows_like_theirs(put):
    put("package.export.invariance.companions", lambda arrays, ends=(), shared=(): [("itself", {n: a[:1] for n, a in arrays.items()})])


@plant
def requests_are_always_joined(put):
    batcher = now("serving.process.loading.Batcher")
    put("serving.process.loading.Batcher", lambda *args, joined=True, **kw: batcher(*args, **kw))


@plant
def recorded_rows_are_asked_by_thirty_two(put):
    put("release.check.comparison.call_rows", lambda package: 32)


@plant
def memory_is_shared_with_the_model(put):
    def run_module(module, arrays, names, fresh=False):
        import torch
        with torch.inference_mode():
            return {n: t.numpy() for n, t in now("package.programs.torch_program.named")(module(*map(torch.from_numpy, arrays.values())), names).items()}
    merge = now("serving.batching.execution.merge")
    put("package.programs.torch_program.run_module", run_module)
    put("serving.batching.execution.merge", lambda jobs, padding=None: jobs[0].arrays if len(jobs) == 1 else merge(jobs, padding))


@plant
def writes_of_the_model_are_not_counted(put):
    put("package.export.invariance._prove_still", never)


@plant
def nobody_asks_anything_else(put):
    put("package.export.invariance._prove_forgetful", never)


@plant
def what_is_no_number_is_saved(put):
    put("package.export.example.check_finite", never)


@plant
def what_is_no_number_is_null(put):
    put("wire.json_body._in_words", lambda array: array)


@plant
def arrays_come_back_in_the_order_of_the_alphabet(put):
    good = now("package.arrays._read")
    put("package.arrays._read", lambda path: dict(sorted(good(path).items())))


@plant
def the_first_output_of_the_alphabet_is_measured(put):
    good = now("package.evaluation._fitting")
    put("package.evaluation._fitting", lambda outputs, labels: list(good(dict(sorted(outputs.items())), labels))[:1])


@plant
def an_output_of_a_known_name_is_taken(put):
    good = now("package.evaluation._fitting")
    def named(outputs, labels):
        readings = list(good(outputs, labels))
        return [r for r in readings if now("package.evaluation.named_form")(r.output)] or readings
    put("package.evaluation._fitting", named)


@plant
def whole_numbers_are_compared_as_floats(put):
    put("package.evaluation._exact", lambda a, b: (a, b))


# ---- what one part does to the others


@plant
def what_is_no_exception_of_a_handler_is_passed_on(put):
    put("package.handler._call", lambda function, *args: function(*args))


@plant
def an_error_of_any_length(put):
    put("serving.http.exchange.error_body", lambda error: {"error": error.message})


@plant
def every_end_with_a_code_is_meant(put):
    "As `os._exit(0)` in a handler would have ended the server"
    import signal

    def ended(watch, worker, code):
        if watch.stopping:
            watch.code = watch.code or max(code, 0)
        elif code >= 0:
            watch.stop(signal.SIGTERM, code)
        else:
            watch.crashed(worker, code)
    put("serving.process.supervisor._ended", ended)
    put("serving.process.supervisor.cause", lambda code: ("died", "Look at the memory limit first."))


@plant
def handlers_take_the_threads_of_large_bodies(put):
    good = now("serving.http.inference.Inference._admit")

    def admit(way, call, body):
        way.intake.aside = lambda call, work, pool, then: way.handlers.submit(then, work)
        return good(way, call, body)
    put("serving.http.inference.Inference._admit", admit)


@plant
def a_stuck_handler_is_left_alone(put):
    put("serving.process.supervisor.stuck", lambda *args, **kw: "")


@plant
def a_handler_has_no_deadline(put):
    put("serving.batching.threads._overdue", never)


@plant
def a_child_keeps_what_its_parent_had(put):
    put("serving.process.fork.let_go", never)


@plant
def lines_go_wherever_stderr_goes(put):
    put("serving.process.worker.keep_stderr", never)


@plant
def a_pause_is_taken_for_a_hang(put):
    put("serving.batching.pause.Pauses.lost", lambda self: 0.0)


@plant
def connections_are_late_after_a_pause(put):
    put("serving.http.listener._grant", never)


@plant
def a_long_request_is_one_batch(put):
    def piece(batcher, runner, ticket):
        return [ticket], *now("serving.batching.scheduler.execute")(runner, [ticket])
    put("serving.batching.scheduler.Batcher._piece", piece)


@plant
def open_files_are_not_counted(put):
    put("serving.server.raise_open_files", never)


@plant
def nothing_is_asked_before_ready(put):
    async def rehearse(life, settings):
        return {}
    put("serving.process.worker.rehearse", rehearse)


@plant
def threads_start_with_the_first_request(put):
    async def ready_for_all(life, settings, making):
        await making
    put("serving.process.worker._ready_for_all", ready_for_all)


@plant
def values_are_read_unseen(put):
    "A trace is believed, whatever it read of its inputs"
    put("package.export.readings", lambda module, tensors: [])


@plant
def only_the_dispatcher_is_heard(put):
    "What a function of torch takes out of a tensor beside the dispatcher is not known"
    put("package.export.dataflow.Flow.takes_out", lambda *args: False)


@plant
def only_the_example_is_asked(put):
    put("package.export.invariance._prove_unlike", lambda live, saved, asked, names, near: [(what, given, saved.run(given, names)) for what, given, _ in asked])


@plant
def no_program_is_fresh(put):
    "What is frozen, and asked last, has answered already"
    for room in ("package.export", "package"):
        put(f"{room}.unused", lambda live: live)


@plant
def sizes_are_values(put):
    "Every tensor is taken for one that holds values of inputs"
    put("package.export.dataflow.Taint.__contains__", lambda self, tensor: True)


@plant
def the_saved_program_answers_held_back_rows(put):
    "The saved program is its own reference"
    good = now("package.live_answers")
    put("package.live_answers", lambda live, program, *args, **kw: good(program, program, *args, **kw))


@plant
def held_back_answers_are_anybodys(put):
    "The package that they name is not looked at"
    def load(file, package):
        groups = now("package.arrays.load_tensors")(file)
        return groups, groups.pop("about")["reference"][0].decode()
    put("release.record.logged_package.read_holdout", load)


@plant
def only_the_examples_size_is_proved(put):
    put("package.export.size_proofs.prove_sizes", never)


@plant
def rows_are_counted_in_the_example_alone(put):
    for page in ("example", "invariance"):
        put(f"package.export.{page}.check_batch", lambda outputs, rows, what="", counts={}: None)


@plant
def boxes_are_cut_as_rows_are(put):
    "What is ragged is cut where the rows are"
    put("serving.batching.execution.rows_of", lambda outputs, counts, rows: {name: array[rows] for name, array in outputs.items()})


@plant
def counts_are_believed(put):
    for page in ("package.export.example", "serving.batching.execution"):
        put(f"{page}.miscounted", lambda outputs, counts, rows: "")


@plant
def counts_are_not_asked_for(put):
    "A client that chooses boxes has them as the model gave them, those of all pictures"
    put("client.Client._counted", lambda client, outputs: list(outputs))


@plant
def a_miscount_breaks_the_contract(put):
    "Whoever asks what the model cannot count ends the service for all"
    put("serving.batching.execution.ModelFailed", now("serving.batching.execution.Broken"))


@plant
def only_the_counts_are_compared(put):
    "Whose boxes they are is not looked at"
    good = now("ragged.rows.compare_rows")

    def compare_rows(expected, got, counts, **terms):
        return good(*({n: a for n, a in side.items() if n not in counts} for side in (expected, got)), {}, **terms)
    put("package.export.invariance.compare_rows", compare_rows)


@plant
def padding_is_believed(put):
    put("package.export.size_proofs.prove_padding", never)


@plant
def a_rate_is_no_part_of_the_key(put):
    "Requests share a call whatever a request has one value of"
    put("serving.process.loading.call_key", lambda inputs=(), padding=None: now("serving.batching.execution.shape_key"))


# ---- local modules


@plant
def the_first_module_of_a_name_is_everybodys(put):
    "As a folder on `sys.path` would have it"
    import sys

    def offer(code):
        sys.path.append(str(code.home))
        return vars(now("package.code.modules.builtins"))
    put("package.handler.offer", offer)


@plant
def modules_are_read_when_they_are_imported(put):
    "As Python's own finder does"
    import pathlib

    class Late(dict):
        def __getitem__(self, file):
            return (self.home / file).read_bytes()
    good = now("package.handler.offer")

    def offer(code):
        sources = Late(code.sources)
        sources.home = pathlib.Path(code.home)
        return good(dataclasses.replace(code, sources=sources))
    put("package.handler.offer", offer)


@plant
def modules_are_not_held_against_the_lock(put):
    put("package.handler.locked_code", now("package.code.modules.code_in"))


@plant
def gaps_in_text_are_texts(put):
    good = now("package.code.python_program._texts")
    put("package.code.python_program._texts", lambda name, array, gap: good(name, array, ""))


@plant
def python_works_on_what_came_in(put):
    def given(arrays, specs):
        return {name: array.ravel() for name, array in arrays.items()}
    put("package.code.python_program._given", given)


@plant
def python_is_taken_at_its_word(put):
    put("package.prove_program", never)


@plant
def a_row_that_comes_alone_is_cast(put):
    import numpy as np
    put("wire.predict._types", now("wire.predict._types") | {(float, "INT64"): np.int64})


@plant
def what_bfloat16_cannot_hold_is_infinite(put):
    put("wire.lists._over", float("inf"))


@plant
def bfloat16_is_cut(put):
    "Numbers are cut to bfloat16, and not rounded"
    good = now("package.axes.moved_module._wrapped")
    def wrapped(module, moves):
        import torch
        class Cut(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = good(module, moves)

            def forward(self, *tensors):
                parts = [torch.frexp(t) for t in tensors]
                return self.model(*[torch.ldexp(torch.trunc(fraction * 256) / 256, power) for fraction, power in parts])
        return Cut().eval()
    put("package.axes.moved_module._wrapped", wrapped)


@plant
def a_fraction_is_cut(put):
    "The type of an example is no matter to an adapter"
    good = now("package.axes.moved_module._arguments")
    put("package.axes.moved_module._arguments", lambda module, moves: good(module, moves._replace(types=())))


@plant
def mlflow_s_numbers_are_cast(put):
    put("serving.model._exact", lambda spec, given: given.astype(now("tensors.DATATYPES")[spec.datatype]))


@plant
def a_query_is_passed_over(put):
    put("serving.http.request_head._refuse_query", never)


@plant
def two_bytes_are_a_half(put):
    "Two bytes of bfloat16 are read as V2's FP16"
    import numpy as np
    put("wire.v2.from_bf16", lambda data, shape, spec, limit: np.frombuffer(data, "<f2").astype("f4").reshape(shape))


# ---- classes


@plant
def classes_are_sorted_as_texts(put):
    "As a list of names is, that somebody keeps beside the client"
    good = now("package.convert.original.TableModel.classes")
    put("package.convert.original.TableModel.classes", property(lambda self: good.fget(self) and sorted(good.fget(self), key=str)))


@plant
def given_classes_are_believed(put):
    put("package.export.classes._check_own", never)


@plant
def labels_are_not_asked_for_the_order(put):
    put("package.export.classes._check_labels", never)


@plant
def classes_of_files_are_believed(put):
    put("package.prove_classes", never)


# ---- R: releases and deployments


@plant
def no_new_pod_is_asked(put):
    put("release.deploy.kubernetes.cluster.Cluster.identify", never)


@plant
def a_bad_version_stays_applied(put):
    put("release.deploy.kubernetes.watching.Watched.do_restore", never)


@plant
def whoever_has_the_name_is_taken_over(put):
    put("release.deploy.kubernetes.cluster.Cluster.refuse_foreign", never)


@plant
def a_namespace_that_is_there_is_made_ours(put):
    def made(self, documents):
        self.kubectl.call("apply", "--filename", "-", given=json.dumps(documents[0]))
    put("release.deploy.kubernetes.cluster.Cluster.make_namespace", made)


@plant
def what_was_applied_last_is_the_way_back(put):
    good = now("release.deploy.kubernetes.rolling.version_before")
    put("release.deploy.kubernetes.rolling.version_before", lambda view, *args: (view.work.version, True) if view.work else good(view, *args))


@plant
def an_autoscaled_file_names_no_number(put):
    put("release.deploy.kubernetes.rolling.with_count", lambda documents, count: documents)


@plant
def what_a_server_added_is_sent_back(put):
    put("release.deploy.kubernetes.cluster._as_sent", json.loads)


@plant
def whoever_applied_last_has_the_target(put):
    good = now("release.deploy.kubernetes.watching.Watched._work")

    def ours(self, view):
        work = good(self, view)
        return work and dataclasses.replace(work, version=self.deployment.version)
    put("release.deploy.kubernetes.watching.Watched._work", ours)


@plant
def old_pods_that_end_are_not_waited_for(put):
    put("release.deploy.kubernetes.watching.Watched.do_rollout", never)


@plant
def the_hub_is_asked_by_name(put):
    from mlserve.release.source.hugging_face import HubHome
    put("release.source.places.find_hub", HubHome)


@plant
def git_is_asked_for_what_is_there_now(put):
    good = now("release.git_source.commit_at")
    put("release.source.tracked.commit_at", lambda folder, revision: good(folder, "HEAD"))


@plant
def a_folder_is_whatever_it_holds(put):
    good = now("release.source.folder.find_folder")
    put("release.source.places.find_folder", lambda address: good(dataclasses.replace(address, revision="")))


@plant
def what_was_fetched_is_believed(put):
    put("package.verify_lock", never)
    put("release.source.dvc.hashlib.file_digest", lambda f, kind: types.SimpleNamespace(hexdigest=lambda: f.name))


@plant
def an_object_is_believed_by_its_name(put):
    from mlserve.release.source import dvc

    def take(place, tracked, target):
        dvc._copy(place, dvc.object_path(tracked), target)
    put("release.source.dvc.take_tracked", take)


@plant
def a_cut_download_is_left_in_place(put):
    put("release.source.bring.discard", never)


@plant
def the_commit_is_a_label_of_a_fetched_package(put):
    put("release.supply_chain.build_inputs.epoch_of", lambda notebook: int(time.time() * 1e6) % 10**9)


@plant
def what_was_changed_in_the_run_is_built(put):
    put("release.pipeline.hold_logged", lambda digest, logged: logged)


@plant
def any_framework_is_taken(put):
    put("package.export.given.warn_of_stack", never)


@plant
def a_framework_without_tests_is_as_good_as_one_with(put):
    good = now("package.environment.check_version")

    def silent(name, version):
        good(name, version)
        return ""
    put("package.environment.check_version", silent)


@plant
def the_extra_decides_the_version_of_an_image(put):
    good = now("release.lock.dependencies.requirements_of")
    put("release.lock.dependencies.requirements_of", lambda package, extra=(), place="", device="cpu", held=(): good(package, extra, place, device))


@plant
def a_newer_file_is_told_in_the_words_of_a_library(put):
    put("package.programs._newer", re.compile("never^"))


@plant
def nobody_says_that_another_version_serves(put):
    put("serving.process.loading.skew", lambda *args: "")


@plant
def the_framework_of_training_is_not_asked_before_a_build(put):
    put("release.plan.check_stack", lambda *args: "")


@plant
def outputs_are_named_in_any_order(put):
    put("package.convert._answers", lambda model, outputs: list(outputs) or ["label", "probabilities"])


@plant
def inputs_of_keras_go_by_their_order(put):
    takes = now("package.convert.keras.declared")
    put("package.convert.keras._of_keras", lambda model, names: lambda given: model(dict(zip(takes(model), given.values())), training=False))


@plant
def an_image_can_convert_what_it_serves(put):
    put("release.lock.dependencies._frameworks", now("release.lock.dependencies._frameworks") | {"onnx": "tables"})
