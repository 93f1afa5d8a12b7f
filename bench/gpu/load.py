"""Keep connections busy with one request, and count the answers: load.py PORT FILE CONNECTIONS SECONDS"""
import json
import re
import selectors
import socket
import sys
import time
from pathlib import Path

LENGTH = re.compile(rb"content-length: *(\d+)", re.I)


def main(port, file, connections, seconds):
    request, chosen, waiting = Path(file).read_bytes(), selectors.DefaultSelector(), {}
    for _ in range(int(connections)):
        s = socket.create_connection(("127.0.0.1", int(port)), 30)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        chosen.register(s, selectors.EVENT_READ)
        s.sendall(request)
        waiting[s] = [time.perf_counter(), b""]
    start = now = time.perf_counter()
    warm, end, answers, others, taken = start + 0.2 * float(seconds), start + float(seconds), 0, 0, []
    while now < end:
        for key, _ in chosen.select(0.1):
            s = key.fileobj
            since, buffer = waiting[s]
            part = s.recv(1 << 20)
            if not part:
                raise SystemExit("the server closed a connection")
            buffer += part
            at = buffer.find(b"\r\n\r\n")
            if at < 0 or len(buffer) < at + 4 + int(LENGTH.search(buffer, 0, at)[1]):
                waiting[s][1] = buffer
                continue
            now = time.perf_counter()
            if now > warm:  # the first fifth only warms
                answers, others = answers + 1, others + (b" 200 " not in buffer[:16])
                taken.append(now - since)
            waiting[s] = [now, b""]
            s.sendall(request)
        now = time.perf_counter()
    print(json.dumps({"answers": answers - others, "others": others, "seconds": now - warm, "p50": sorted(taken)[len(taken) // 2] if taken else 0}))


main(*sys.argv[1:])
