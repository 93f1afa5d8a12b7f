"""A TCP proxy that does to a connection what networks do: delay, cut, reset, freeze, throttle, damage."""
import asyncio
import socket
import struct
import threading
import time
from functools import partial


class Proxy:
    "Passes bytes between a free port of this machine and a server, or a Unix socket, until a fault is planted"

    def __init__(self, port, host="127.0.0.1", listen="127.0.0.1"):
        self.connections, self.down, self.listen = 0, 0, listen
        self.connect = partial(asyncio.open_connection, host, port) if isinstance(port, int) else partial(asyncio.open_unix_connection, port)
        self.clear()

    def clear(self):
        "No fault"
        self.cut = None  # total bytes of answers after which every connection ends, once
        self.every = None  # bytes of answers after which a connection ends, each time
        self.spare = 0  # pieces of answers that pass before any of the next four begins
        self.reset = False  # every connection is reset at once
        self.lost = 0  # connections to come of which nobody answers, as behind a NAT that forgot them
        self.frozen = False  # answers stop coming, connections stay
        self.delay = 0  # seconds before each piece of an answer
        self.rate = None  # bytes a second for each connection
        self.flip = None  # (bytes, bytes): the first is replaced by the second wherever it passes
        self.answers = []  # whole answers given instead of the server's, one a connection
        self.met = None  # when somebody first met a reset, or an answer that does not come

    def __enter__(self):
        started = threading.Event()
        self.loop = asyncio.new_event_loop()

        async def main():
            server = await asyncio.start_server(self._serve, self.listen, 0)
            self.port = server.sockets[0].getsockname()[1]
            self.stop = asyncio.Event()
            started.set()
            await self.stop.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        self.thread = threading.Thread(target=lambda: asyncio.Runner(loop_factory=lambda: self.loop).run(main()), daemon=True)
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            if self.reset and not self.spare:
                return self._reset(writer)
            if self.lost:
                self.lost -= 1
                while await reader.read(65536):
                    pass
                return
            if self.answers:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(self.answers.pop(0))
                return await writer.drain()
            up_reader, up_writer = await self.connect()
            try:
                ends = [asyncio.ensure_future(self._up(reader, up_writer)), asyncio.ensure_future(self._down(up_reader, writer))]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for end in ends:
                    end.cancel()
            finally:
                up_writer.close()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def _reset(self, writer):
        self.met = self.met or time.monotonic()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def _up(self, reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def _down(self, reader, writer):
        left = self.every
        while data := await reader.read(65536):
            if self.spare:
                self.spare -= 1
            else:
                if self.reset:
                    return self._reset(writer)
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self.rate:
                    await asyncio.sleep(len(data) / self.rate)
                while self.frozen:
                    self.met = self.met or time.monotonic()
                    await asyncio.sleep(0.05)
            if self.flip:
                data = data.replace(*self.flip)
            last = self.cut is not None and self.down + len(data) >= self.cut
            if last:
                data, self.cut = data[:max(self.cut - self.down, 0)], None
            if left is not None:
                data, left, last = data[:left], left - len(data), last or left <= len(data)
            self.down += len(data)
            writer.write(data)
            await writer.drain()
            if last:
                return
