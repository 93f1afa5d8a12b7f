"""Steady load for the tests: many connections from one thread, each request with a number of its own."""
import asyncio
import json
import threading
import time


class Load:
    "Clients that ask, each in turn, until told to stop; `path` answers with V2's JSON. `enter` is called in the thread first; `life`: requests of one connection"

    def __init__(self, port, connections=16, path="/v2/models/double/infer", first=1, pause=0.0, host="127.0.0.1", enter=lambda: None, life=0):
        self.port, self.connections, self.path, self.number, self.pause = port, connections, path, first, pause
        self.host, self.enter, self.life = host, enter, life
        self.answers, self.failures, self.seconds = {}, [], []  # number to (version, when it was sent); what went wrong; how long each took
        self.going = True
        self.thread = threading.Thread(target=self._ask_all)

    def _ask_all(self):
        self.enter()
        asyncio.run(self._run())

    async def _ask(self, reader, writer, number):
        rows = 1 + number % 3
        body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [%d, 2], "data": [%s]}]}' % (rows, b",".join([b"%d,0" % number] * rows))
        writer.write(b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nx-request-id: n-%d\r\ncontent-length: %d\r\n\r\n%s" % (self.path.encode(), number, len(body), body))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        return head, await reader.readexactly(size)

    async def _client(self):
        reader = writer = None
        asked = 0  # by this connection
        while self.going:
            number, self.number, sent = self.number, self.number + 1, time.monotonic()
            try:
                if writer is None:
                    reader, writer = await asyncio.open_connection(self.host, self.port)
                    asked = 0
                head, body = await asyncio.wait_for(self._ask(reader, writer, number), 30)
            except (OSError, EOFError, asyncio.TimeoutError) as e:
                self.failures.append((number, repr(e)))
                writer = None
                await asyncio.sleep(0.01)
                continue
            self.seconds.append(time.monotonic() - sent)
            self._look(number, sent, head, body)
            asked += 1
            if b"connection: close" in head or asked == self.life:
                writer.close()
                writer = None
            if self.pause:
                await asyncio.sleep(self.pause)
        if writer is not None:
            writer.close()

    def _look(self, number, sent, head, body):
        if not head.startswith(b"http/1.1 200") or b"x-request-id: n-%d\r\n" % number not in head:
            self.failures.append((number, (head + body)[:300]))
            return
        answer = json.loads(body)
        if answer["outputs"][0]["data"] != [2 * number, 0] * (1 + number % 3) or number in self.answers:
            self.failures.append((number, answer))
        self.answers[number] = answer.get("model_version", ""), sent

    async def _run(self):
        await asyncio.gather(*[self._client() for _ in range(self.connections)])

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *a):
        self.going = False
        self.thread.join()
