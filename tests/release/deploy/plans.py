"""Recorded versions, and what is planned for them; run by itself it writes the golden files."""
from pathlib import Path

from mlserve.release.deploy.deployment import ENGINES, plan
from mlserve.release.deploy.options import DeployOptions
from mlserve.release.record import Pair
from mlserve.release.spec import ReleaseSpec

GOLDEN = Path(__file__).parent / "golden"
IMAGE, PACKAGE, PROXY = "registry.test/digits@sha256:" + "a" * 64, "sha256:" + "c" * 64, "registry.test/haproxy@sha256:" + "b" * 64
FINDING = {"passed": True, "times": {"ready": 4.63}, "speed": {kind: {"p99_ms": [1.9, 4.2], "clients": [1, 4, 16, 64],
           "requests_per_second": [812.5, 1620.0, 2410.0, 2533.3]} for kind in ("cpu", "cuda")}}
SLOW = {"passed": True, "times": {"ready": 96}, "speed": {"cpu": {"p99_ms": [900, 8200], "clients": [1, 4, 16, 64], "requests_per_second": [1, 1, 1, 1]}}}

# name of a version: model, finding, fields of its spec, keys of [deploy], engines that cannot have it
VERSIONS = {
    "digits": ("digits", FINDING, {}, {}, ()),
    "gpu": ("digits", FINDING, dict(device="cuda"), dict(memory="8g", cpus=4, replicas=2, max_replicas=2), ()),
    "store": ("digits", FINDING, dict(delivery="store", store="s3://models"), dict(cache="packages", credentials="store"), ()),
    "registry": ("digits", FINDING, dict(delivery="registry"), dict(replicas=12, cpus=0.5, port=80, host="0.0.0.0", namespace="vision"), ()),
    "volume": ("digits", FINDING, dict(delivery="volume", device="cuda"), dict(volume="weights-of-march"), ("ecs", "sagemaker")),
    "grpc": ("digits", FINDING, dict(requirements=["grpcio"]), dict(grpc_port=8081, replicas=2), ("ecs", "sagemaker")),
    "slow": ("a.b_c", SLOW, dict(delivery="store", store="gs://models"), dict(memory="24g", cpus=4), ()),
}
PLACES = {"s3://models": "s3://models/" + "c" * 64, "gs://models": "gs://models/" + "c" * 64}


def planned(version, engine):
    "The plan of a version"
    model, finding, spec, options, _ = VERSIONS[version]
    fields = {"name": "digits", "notebook": "digits.ipynb", "repository": "registry.test/digits", "base": "python:3.11", **spec}
    place = "models:/digits/3" if fields.get("delivery") == "registry" else PLACES.get(fields.get("store"), "")
    pair = Pair(model, "3", IMAGE, PACKAGE, "run", "m-1", "checked", {fields.get("device", "cpu"): finding}, {"mlserve.place": place})
    return plan(engine, pair, ReleaseSpec(**fields, deploy=DeployOptions(**options)), PROXY)


CASES = [(version, engine) for version, (*_, without) in VERSIONS.items() for engine in ENGINES if engine not in without]
KEPT = [(version, engine) for version, engine in CASES if version in ("digits", "gpu")]

if __name__ == "__main__":
    from mlserve.release.deploy.rendering import to_text
    GOLDEN.mkdir(exist_ok=True)
    for version, engine in KEPT:
        (GOLDEN / f"{engine}-{version}.yaml").write_text(to_text(planned(version, engine)))
