"""A container whose memory runs out (E8): foreseen, caught, and killed by the kernel."""

import httpx
import pytest
import torch
from commands import TESTS
from servers import until
from containers import HARDENED, address, docker_cli, wait_healthy

MEMORY = "640m"


class Hungry(torch.nn.Module):
    "Takes as many MiB as the second number of its first row says"

    def forward(self, x):
        room = torch.ones(torch.clamp(x[0, 1], min=0).to(torch.int64) * 262144)
        return x * 2 + room.sum() * 0


@pytest.fixture(scope="module")
def hungry(tmp_path_factory):
    "Its package, where a container may read it"
    from mlserve.package import save_package
    folder = tmp_path_factory.mktemp("hungry") / "hungry"
    package = save_package(torch.jit.script(Hungry().eval()), folder, "hungry", {"x": torch.zeros(4, 2)}, ["y"])
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in folder.parents:
        if path.is_relative_to(tmp_path_factory.getbasetemp().parent):
            path.chmod(0o755)
    return package


def runs_out(image, start, hungry, *more):  # noqa: F811
    "One life of a container whose memory runs out in every way"
    flags = [f for f in HARDENED if f not in ("--memory", "--memory-swap", "1g")]
    container = start(image, *flags, "--memory", MEMORY, "--memory-swap", MEMORY, "--user", "10001:10001", "-v", f"{hungry.path}:/models/package:ro",
                      "-e", f"MLSERVE_PACKAGE_DIGEST={hungry.digest}", "-e", "MLSERVE_MAX_BODY=1000000", "-e", "MLSERVE_DRAIN_DELAY=0", *more)
    wait_healthy(container)

    def predict(*rows):
        return httpx.post(address(container) + "/predict", json={"inputs": rows}, timeout=60, trust_env=False)

    def works():
        try:
            return predict([1, 0]).json() == {"outputs": [[2.0, 0.0]]}
        except httpx.HTTPError:
            return False
    assert works()
    assert predict(*[[1, 0]] * 150_000).status_code == 413, "foreseen: 1.2 MB of tensors in 1 MB of JSON"
    full = predict([1, 2**22])
    assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1, "caught: 4 TiB, which no allocator gives"
    assert works()
    with pytest.raises(httpx.HTTPError):  # killed: 2 GiB, which the allocator gives and the kernel does not have
        predict([1, 2048])
    until(works, 60)
    said = container.logs().decode()
    assert '"worker_died"' in said and '"signal": 9' in said
    assert docker_cli("kill", "--signal", "KILL", container.id).returncode == 0
    assert container.wait()["StatusCode"] == 137
    container.start()
    wait_healthy(container)
    assert works()
    assert docker_cli("diff", container.id).stdout == "", "nothing is left that a start could stumble over"


def test_E8_in_a_container_what_is_too_large_is_413_what_fails_is_503_and_what_is_killed_comes_back(release, start, hungry):  # noqa: F811
    runs_out(release["image"], start, hungry)


def test_E8_control_memory_that_is_taken_for_a_fault_of_the_input_is_seen(release, start, hungry, tmp_path):  # noqa: F811
    "The same image, with a bug planted as the interpreter starts"
    (tmp_path / "mutations.py").write_bytes((TESTS / "mutations.py").read_bytes())
    (tmp_path / "sitecustomize.py").write_text("import mutations; mutations.sow('memory_errors_are_like_others')")
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to(hungry.path.parent.parent.parent):
            path.chmod(0o755)
    with pytest.raises(AssertionError, match="500 == 503"):
        runs_out(release["image"], start, hungry, "-v", f"{tmp_path}:/plants:ro", "-e", "PYTHONPATH=/plants:/opt/mlserve")
