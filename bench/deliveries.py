"""How fast a package arrives: mlserve beside a plain parallel client, from one store on this machine.

    python bench/deliveries.py [--megabytes 500] [--runs 3]

The store answers S3's GET and HEAD from files, with ranges, in a process of its own. Each run reads the same object with boto3's
parallel download and with mlserve's `fetch`, in turn, onto the same disk, so that a busy machine slows both. Then whole starts are
timed: a folder, as baked and mounted packages are, and the store with an empty and a filled cache. One JSON line is the result.
"""
import argparse
import asyncio
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def store(folder):
    "Files of a folder as objects of a store; prints its port"
    from aiohttp import web

    async def answer(request):
        path = Path(folder) / request.match_info["bucket"] / request.match_info["key"]
        return web.FileResponse(path, headers={"ETag": '"0"'}) if path.is_file() else web.Response(status=404)

    async def main():
        app = web.Application()
        app.router.add_get("/{bucket}/{key:.+}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(site._server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())


def upload(folder, megabytes):
    "A package with a large weights file, made from a small one; its digest"
    import torch

    from mlserve.package.lock import write_lock
    from mlserve.package import save_package
    package = save_package(torch.nn.Linear(4, 2), folder, "large", {"x": torch.rand(3, 4)}, ["y"])
    with open(package.path / "weights.bin", "wb") as f:
        for _ in range(megabytes):
            f.write(os.urandom(10**6))
    return write_lock(package.path)


def plain(client, size, to):
    "boto3's own parallel download; MB/s"
    from boto3.s3.transfer import TransferConfig
    start = time.perf_counter()
    client.download_file("models", "large/weights.bin", str(to), Config=TransferConfig(max_concurrency=8, multipart_chunksize=8 * 2**20))
    return size / 1e6 / (time.perf_counter() - start)


def fetched(size, to):
    "mlserve's parallel ranged reads; MB/s"
    from mlserve.serving.delivery.cache import Partial
    from mlserve.serving.delivery.download import TimeBudget, fetch, run_coroutine
    from mlserve.serving.delivery.object_store import ObjectStore
    start = time.perf_counter()
    run_coroutine(fetch(ObjectStore("s3://models/large"), Partial(to / "package", {"weights.bin": size}), TimeBudget(600), lambda *a, **k: None))
    return size / 1e6 / (time.perf_counter() - start)


def opened(place, digest, cache):
    "Seconds until a package is on this machine and verified"
    from mlserve.serving.delivery.resolver import open_package
    from mlserve.settings import read_settings
    start = time.perf_counter()
    open_package(read_settings({"MLSERVE_PACKAGE": str(place), "MLSERVE_PACKAGE_DIGEST": digest, "MLSERVE_CACHE": str(cache)}))
    return time.perf_counter() - start


def measure(root, port, digest, runs):
    "Every number, in turn"
    import boto3
    os.environ.update(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1")
    client, source = boto3.client("s3"), root / "store/models/large"
    size, speeds, starts = (source / "weights.bin").stat().st_size, [], []
    for n in range(runs + 1):
        target = root / f"run{n}"
        target.mkdir()
        pair = plain(client, size, target / "plain"), fetched(size, target)
        assert hashlib.file_digest(open(target / "package/weights.bin", "rb"), "sha256").digest() == hashlib.file_digest(open(target / "plain", "rb"), "sha256").digest()
        shutil.rmtree(target)
        cache = root / f"cache{n}"
        times = opened(source, digest, cache), opened("s3://models/large", digest, cache), opened("s3://models/large", digest, cache)
        shutil.rmtree(cache)
        if n:  # the first run warms the page cache and the imports
            speeds.append(pair)
            starts.append(times)
    plain_mb_s, fetch_mb_s = (round(statistics.median(s)) for s in zip(*speeds))
    folder_s, first_s, second_s = (round(statistics.median(s), 2) for s in zip(*starts))
    return {"megabytes": size // 10**6, "runs": runs, "plain_mb_s": plain_mb_s, "fetch_mb_s": fetch_mb_s,
            "ratio": round(statistics.median(f / p for p, f in speeds), 2), "folder_s": folder_s, "store_first_s": first_s, "store_second_s": second_s}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--store", help="serve this folder as a store, and do nothing else")
    asked = parser.parse_args()
    if asked.store:
        return store(asked.store)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        root = Path(scratch)
        (root / "store/models").mkdir(parents=True)
        digest = upload(root / "store/models/large", asked.megabytes)
        server = subprocess.Popen([sys.executable, __file__, "--store", root / "store"], stdout=subprocess.PIPE, text=True)
        try:
            print(json.dumps(measure(root, int(server.stdout.readline()), digest, asked.runs)))
        finally:
            server.terminate()
            server.wait(10)


if __name__ == "__main__":
    main()
