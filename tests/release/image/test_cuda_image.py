"""The GPU flavour, built once for real: it downloads 2.5 GB of wheels, so `make cuda-image` runs it and `make test` does not."""
import json
import time

import pytest

from commands import EXAMPLE, mlserve
from images import config_findings
from containers import HARDENED, docker_cli

pytestmark = pytest.mark.cuda_image
LOOK = """
import json, os, torch
from torch._C import _cuda_getDeviceCount
model = torch.jit.load('/models/package/model.pt')
print(json.dumps(dict(cuda=torch.version.cuda, arch=torch.cuda.get_arch_list(), there=torch.cuda.is_available(), answer=list(model(torch.zeros(2, 1, 8, 8)).shape),
    cache=oct(os.stat('/var/cache/cuda').st_mode & 0o7777))))
"""


@pytest.fixture(scope="module")
def cuda(environment, released, engine):
    "The image of the digits package for `cuda`, removed afterwards"
    began = time.monotonic()
    done = mlserve("build", EXAMPLE, "--package", released.path, "--device", "cuda", "--json", env=environment, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    print(f"{result['size_mb']} MB, the build {result['seconds']} s, the whole command {time.monotonic() - began:.0f} s")
    yield result
    engine.images.remove(result["image"], force=True)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("flags", [[], HARDENED + ["--user", "4242:0"]], ids=["plain", "hardened"])
def test_without_a_gpu_it_ends_with_nine_within_ten_seconds(cuda, flags):
    began = time.monotonic()
    done = docker_cli("run", "--rm", "--network", "none", *flags, cuda["image"])
    assert done.returncode == 9 and time.monotonic() - began < 10, done.stderr
    said = json.loads(done.stderr.strip().splitlines()[-1])
    assert said["code"] == 9 and "no NVIDIA driver" in said["error"] and "--gpus all" in said["error"]


def test_its_torch_is_built_for_cuda_and_complete(cuda):
    "It imports, so every library of CUDA that it is linked to is there; and it infers on the CPU, when somebody asks it to"
    done = docker_cli("run", "--rm", "--network", "none", "--entrypoint", "/opt/venv/bin/python", cuda["image"], "-c", LOOK)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["cuda"] and found["there"] is False and found["answer"] == [2, 10] and found["cache"] == "0o1777"


def test_its_variables_are_those_of_the_toolkit_and_the_driver(cuda, engine):
    config = engine.images.get(cuda["image"]).attrs["Config"]
    env = dict(e.split("=", 1) for e in config["Env"])
    assert (env["NVIDIA_VISIBLE_DEVICES"], env["NVIDIA_DRIVER_CAPABILITIES"], env["CUDA_CACHE_PATH"]) == ("all", "compute,utility", "/var/cache/cuda")
    assert env["MLSERVE_DEVICE"] == "cuda" and not config.get("Volumes") and config_findings({"config": config}) == []
