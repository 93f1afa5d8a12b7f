"""The main job on real parts: engine, registry, MLflow over HTTP, the example's image; and what it answers."""
import json
import os
import signal
import subprocess
import time

import httpx
import numpy as np
import pytest

from commands import EXAMPLE, TESTS, interrupted, last_json, mlserve, start_mlserve
from containers import HARDENED, address, damaged, docker_cli, wait_healthy
from servers import until

from mlserve.errors import gpu_reasons
from mlserve.release.record.journal import OWNER, owner_of

def test_release_says_what_it_made(release):
    assert release["model"] == "digits" and int(release["version"]) >= 1
    assert "@sha256:" in release["image"] and release["package"].startswith("sha256:")
    assert f"-e MLSERVE_MODEL_VERSION={release['version']} -e MLSERVE_IMAGE={release['image']} " in release["commands"]["serve"]
    accuracy = release["metrics"]["accuracy"]
    assert accuracy["notebook"] >= 0.97 and accuracy["baseline"] < 0.2 and release["check"]["reading"] == "'logits' as scores in 10 columns"
    assert accuracy["container"] == pytest.approx(accuracy["notebook"], abs=0.003)
    assert release["reference"] == "live model" and not any("live model" in w for w in release["warnings"])
    assert release["device"] == "cpu" and 0 < release["image_mb"] < 2000
    assert set(release["aliases"]) == {"candidate", "production"}
    assert all(s["seconds"] >= 0 for s in release["steps"]) and len(release["steps"]) >= 4
    assert all(os.path.exists(p) for p in release["evidence"]) and len(release["evidence"]) == 4


def test_the_registry_answers_for_the_digest(release):
    repository, digest = release["image"].split("@")
    host, name = repository.split("/", 1)
    answer = httpx.head(f"http://{host}/v2/{name}/manifests/{digest}", trust_env=False,
                        headers={"Accept": "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"})
    assert answer.status_code == 200 and answer.headers["Docker-Content-Digest"] == digest


def test_the_record_holds_the_pair(release, tracking):
    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=tracking)
    version = client.get_model_version("digits", release["version"])
    assert version.tags["mlserve.image"] == release["image"]
    assert version.tags["mlserve.package"] == release["package"]
    assert version.tags["mlserve.reference"] == json.loads(version.tags["mlserve.check.cpu"])["reference"] == "live model"
    assert version.tags["mlserve.status"] == "checked"
    finding = json.loads(version.tags["mlserve.check.cpu"])
    assert finding["passed"] is True and 60e6 < finding["memory"] < 1.5e9  # what a deployment's limit is planned from
    for alias in ("candidate", "production"):
        assert client.get_model_version_by_alias("digits", alias).version == version.version


def strict(text):
    "JSON as other readers know it"
    def refuse(constant):
        raise ValueError(constant)
    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("device, code", [("cuda", 9), pytest.param("cuda:0", 9, marks=pytest.mark.matrix), ("tpu", 2)])
def test_a_check_that_cannot_run_leaves_the_record_as_it_was(release, environment, tracking, device, code):
    "The image holds a torch for the CPU: whether or not the host has a GPU, it cannot be checked on one"
    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=tracking)

    def recorded():
        return client.get_model_version("digits", release["version"]).tags, dict(client.get_registered_model("digits").aliases)
    before = recorded()
    done = mlserve("check", "digits", "--version", release["version"], "--device", device, env=environment)
    assert done.returncode == last_json(done.stderr)["code"] == code, done.stderr[-3000:]
    assert code != 9 or last_json(done.stderr)["reason"] in gpu_reasons  # out of a container or the engine, through the kernel of a notebook
    assert recorded() == before


def test_what_passed_on_a_cpu_is_promoted_for_one_and_for_no_gpu(release, environment):
    done = mlserve("promote", "digits", "--version", release["version"], env=environment)
    assert done.returncode == 0 and done.stdout.strip() == release["image"]
    done = mlserve("promote", "digits", "--version", release["version"], "--device", "cuda", env=environment)
    assert done.returncode == 3 and "--device cuda" in last_json(done.stderr)["error"]


def test_a_second_check_takes_device_and_delivery_from_the_record(release, environment, tracking, engine):
    "It clears away what a kernel had started that was killed in a check, while its command lived"
    with subprocess.Popen(["sleep", "60"]) as kernel:
        left = engine.containers.create(release["image"], labels={OWNER: owner_of(kernel.pid)})
        kernel.kill()
    done = mlserve("check", "digits", "--version", release["version"], "--json", env=environment)
    found = strict(done.stdout)
    assert done.returncode == 0 and (found["passed"], found["device"], found["delivery"]) == (True, "cpu", "baked")
    from mlflow import MlflowClient
    assert strict(MlflowClient(tracking_uri=tracking).get_model_version("digits", release["version"]).tags["mlserve.check.cpu"])["passed"]
    assert left.id not in {box.id for box in engine.containers.list(all=True, ignore_removed=True)}


def test_the_doctor_removes_a_container_of_a_killed_command(release, environment, engine, tmp_path):
    "And leaves alone one whose owner lives"
    mine = engine.containers.create(release["image"], labels={OWNER: owner_of()})
    try:
        def examined(*options):
            with subprocess.Popen(["sleep", "60"]) as kernel:
                left = engine.containers.create(release["image"], labels={OWNER: owner_of(kernel.pid)})
                kernel.kill()
            done = mlserve("doctor", "--json", *options, env={**environment, "MLSERVE_STATE": str(tmp_path)})
            return left, next(f for f in json.loads(done.stdout) if f["what"] == "containers")
        asked = (examined() for _ in range(9))  # commands of other lanes clear away as well, and may be quicker
        left, found = next((left, found) for left, found in asked if found["state"] != "ok")
        assert left.name in found["told"] and mine.name not in found["told"]
        asked = (examined("--fix", "--yes") for _ in range(9))
        left, found = next((left, found) for left, found in asked if found["mended"])
        there = {box.id for box in engine.containers.list(all=True, ignore_removed=True)}
        assert left.id not in there and mine.id in there
    finally:
        mine.remove(force=True)


@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.matrix)])
def test_an_interrupted_check_leaves_no_container(release, environment, engine, sign):
    image = release["image"]
    process = start_mlserve("check", image, env=environment)
    until(lambda: image in {container["Image"] for container in engine.api.containers()}, 120)
    code, stderr = interrupted(process, sign)
    assert code == last_json(stderr)["code"] == 130, stderr
    assert image not in {container["Image"] for container in engine.api.containers(all=True)}


def shown(path):
    "What an executed notebook shows: the source of each cell with the types of its outputs"
    cells = json.loads(open(path).read())["cells"]
    return {"".join(c["source"]): [t for o in c.get("outputs", ()) for t in o.get("data", ())] for c in cells}


def test_the_executed_check_has_the_curves_and_the_run_has_their_numbers(release, tracking, tmp_path):
    from mlflow import MlflowClient
    speed = release["check"]["speed"]
    assert list(speed) == ["cpu"] and speed["cpu"]["rows"] == [1, 2, 4, 8, 16, 32] and speed["cpu"]["clients"] == [1, 4, 16, 64]
    one = speed["cpu"]
    assert all(0 < inside < seen <= tail for inside, seen, tail in zip(one["model_ms"], one["p50_ms"], one["p99_ms"]))
    assert one["cold_ms"] > 0 and one["first_ms"] > 0 and min(one["requests_per_second"]) > 0
    client = MlflowClient(tracking_uri=tracking)
    for name, steps in (("p50_ms", one["rows"]), ("model_ms", one["rows"]), ("requests_per_second", one["clients"])):
        logged = client.get_metric_history(release["run"], f"check.cpu.{name}")
        assert [(m.step, m.value) for m in logged][:len(steps)] == list(zip(steps, one[name]))
    executed = client.download_artifacts(release["run"], "evidence/check_inference.ipynb", str(tmp_path))
    [outputs] = [outputs for source, outputs in shown(executed).items() if "speed_plot(result.speed)" in source]
    assert "image/png" in outputs


def artifacts(client, run, path=None):
    "Every file of a run"
    for found in client.list_artifacts(run, path):
        if found.is_dir:
            yield from artifacts(client, run, found.path)
        else:
            yield found.path


def test_every_name_that_a_release_writes_has_its_text(release, tracking, engine):
    "And no text is about a tag of the version that no release writes; where a package was fetched, a release of a notebook has nothing to say"
    from mlflow import MlflowClient

    from mlserve.release.record import names
    client = MlflowClient(tracking_uri=tracking)
    version, run = client.get_model_version("digits", release["version"]), client.get_run(release["run"])
    written = {"tags of the version": (version.tags, names.tag_names()), "tags of the run": (run.data.tags, names.RUN_TAGS),
               "metrics": (run.data.metrics, names.METRIC_NAMES), "artifacts": (artifacts(client, release["run"]), names.ARTIFACTS),
               "labels": (engine.images.get(release["image"]).labels, names.IMAGE_LABELS)}
    assert not [(what, *missing) for what, (there, table) in written.items() if (missing := names.unexplained(there, table))]
    asked = {name.replace("{device}", "cpu") for name in names.tag_names()}
    assert asked - {"mlserve.from"} == set(version.tags), asked ^ set(version.tags)


def test_the_page_of_the_version_has_its_model_with_metrics_and_parameters(release, tracking, tmp_path):
    from mlflow import MlflowClient
    client = MlflowClient(tracking_uri=tracking)
    run = client.get_run(release["run"])
    [made] = run.outputs.model_outputs
    model = client.get_logged_model(made.model_id)
    assert {"name": "digits", "version": release["version"]} in [{**v, "version": str(v["version"])} for v in json.loads(model.tags["mlflow.modelVersions"])]
    assert {m.key for m in model.metrics} == set(run.data.metrics) and model.params == run.data.params
    first, *_ = sorted(client.get_metric_history(release["run"], "check.cpu.latency_ms"), key=lambda m: m.timestamp)  # later checks add theirs
    assert first.value == release["check"]["speed"]["cpu"]["p50_ms"][0]
    with open(client.download_artifacts(release["run"], "check_cpu.json", str(tmp_path))) as f:
        table = json.load(f)
    image = {row[0]: row[table["columns"].index("image")] for row in table["data"]}
    assert image["verdict"] == "passed" and float(image["accuracy"]) == pytest.approx(release["metrics"]["accuracy"]["container"], rel=1e-5)
    assert {"path": "check_cpu.json", "type": "table"} in json.loads(run.data.tags["mlflow.loggedArtifacts"])  # by which MLflow lists tables


def test_executed_notebooks_are_pages_that_ask_nobody_and_name_no_place_of_this_machine(release, tracking, state, tmp_path):
    from pathlib import Path

    from mlflow import MlflowClient

    from commands import ROOT
    from mlserve.release.record import read_pair
    from mlserve.release.supply_chain.provenance import unseal
    from mlserve.release.supply_chain.statement import read_statement
    client = MlflowClient(tracking_uri=tracking)
    kept = Path(client.download_artifacts(release["run"], "evidence", str(tmp_path)))
    pages = {page.stem: page.read_text() for page in kept.glob("*.html")}
    assert set(pages) == {Path(book).stem for book in release["evidence"]} and len(pages) == 4
    for text in pages.values():
        assert "default-src 'none'" in text and "<script" not in text
        assert not [place for place in (str(state), str(ROOT), str(Path.home()) + "/") if place in text]
    assert "data:image/png" in pages["check_inference"]
    print({page.name: page.stat().st_size for page in kept.glob("*.html")})
    pair = read_pair("digits", release["version"], tracking)
    statement = client.download_artifacts(release["run"], f"statements/{pair.tags['mlserve.statement.cpu'].removeprefix('sha256:')}.json", str(tmp_path))
    said = read_statement(unseal(Path(statement).read_bytes(), "")[0])
    assert all(f"evidence/{name}.html" in said.evidence for name in pages)


@pytest.fixture
def for_gpu(release, tracking, double, monkeypatch):
    "A version that is recorded for a GPU: another package, beside the image of the release"
    from mlflow import MlflowClient

    from mlserve.release import record
    from mlserve.release.spec import ReleaseSpec
    from mlserve.release.record.mlflow_store import experiment
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    spec, client = ReleaseSpec(name="double", notebook="double.ipynb", device="cuda", delivery="volume"), MlflowClient(tracking_uri=tracking)
    run = client.create_run(experiment(client), tags={"mlserve.spec": spec.model_dump_json()})
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    yield record.record("double", record.log_package(double), release["image"], {"mlserve.device": "cuda", "mlserve.delivery": "volume"})
    client.delete_registered_model("double")  # whoever looks for the image by its digest finds the release


def test_a_running_service_is_held_against_its_version(release, for_gpu, start, environment):
    "By its address: it is the version that it says it is, and answers as the notebook did; another version's package is told"
    container = start(release["image"], "-e", f"MLSERVE_MODEL_VERSION={release['version']}", "-e", f"MLSERVE_IMAGE={release['image']}")
    wait_healthy(container)
    done = mlserve("check", "digits", "--url", address(container), "--json", env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["version"], found["rows"]) == (release["version"], release["check"]["rows"])
    assert found["metrics"]["accuracy"]["container"] == release["metrics"]["accuracy"]["container"] and not found["speed"]
    done = mlserve("check", "double", "--version", for_gpu.version, "--url", address(container), env=environment)
    assert done.returncode == last_json(done.stderr)["code"] == 5 and "The service runs the package" in done.stderr, done.stderr


def test_two_versions_that_share_an_image_are_each_named_by_the_diff(for_gpu, double, release, environment):
    "The same digest stands in both; it named the newest twice"
    from mlserve.release import record
    again = record.record("double", record.log_package(double), release["image"])
    done = mlserve("diff", "double", for_gpu.version, again.version, "--json", env=environment)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["same"]
    assert [found[side]["version"] for side in "ab"] == [for_gpu.version, again.version]


@pytest.fixture
def pretended(for_gpu, double, tmp_path, monkeypatch):
    "Check that version in real containers, on a GPU that is pretended: milliseconds of the model there and on the CPU → what was found"

    from mlserve.release import check
    from test_gpu import build
    tmp_path.chmod(0o755)  # the container's user is another
    library, tests = build(tmp_path), TESTS

    def checked(gpu_ms, cpu_ms, device="cuda"):
        def gpu_options(device):
            cuda = device.startswith("cuda")
            env = {"MLSERVE_PACKAGE_DIGEST": for_gpu.package, "FAKE_SECONDS": str((gpu_ms if cuda else cpu_ms) / 1000)}
            volumes = {str(tests): {"bind": "/tests", "mode": "ro"}, str(library): {"bind": "/cuda", "mode": "ro"}}
            return {"environment": env | ({"LD_LIBRARY_PATH": "/cuda"} if cuda else {}), "volumes": volumes, "entrypoint": ["/opt/venv/bin/python", "/tests/fake_server.py"]}
        monkeypatch.setattr(check, "gpu_options", gpu_options)
        return check.check(for_gpu, device)
    return checked


def told(found):
    "What a check found, in one line each"
    return "\n".join(f"{name}: {value}" for name, value in vars(found).items() if name in ("passed", "code", "reason", "warnings", "speed", "placement", "times"))


def test_without_a_gpu_the_job_fails_with_nine_and_its_reason_and_the_version_stays_recorded(for_gpu, environment, tracking, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    from mlserve.errors import CheckFailed, GpuRefused
    from mlserve.release import record
    from mlserve.release.recheck import check_again
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(GpuRefused) as e:
        check_again(for_gpu)  # the image is another model's, so `mlserve check` would refuse it before
    assert (e.value.code, e.value.reason) == (9, "no_toolkit"), e.value
    assert record.read_pair("double", for_gpu.version) == for_gpu and for_gpu.status == "recorded"
    client = MlflowClient(tracking_uri=tracking)
    [kept] = [f.path for f in client.list_artifacts(for_gpu.run_id, "evidence") if f.is_dir]
    executed = client.download_artifacts(for_gpu.run_id, f"{kept}/check_inference.ipynb", str(tmp_path))
    assert "GpuRefused" in open(executed).read() and "reason: no_toolkit" in open(executed).read()
    for device in (None, "cuda", "cpu"):
        with pytest.raises(CheckFailed, match="its check has not passed on cuda"):
            record.promote("double", for_gpu.version, device)


def test_a_container_that_cannot_be_reached_is_no_failed_check(for_gpu, monkeypatch):
    "Its port leads nowhere, as beside a remote engine, and it is ready for itself: 6, and the version stays recorded"
    from mlserve.errors import RemoteUnavailable
    from mlserve.release import check, record
    own = {"environment": {"MLSERVE_HOST": "127.0.0.1", "MLSERVE_PACKAGE_DIGEST": for_gpu.package}}
    monkeypatch.setattr(check, "gpu_options", lambda device: own)
    with pytest.raises(RemoteUnavailable, match="is ready, and cannot be reached at http://127.0.0.1:"):
        check.check(for_gpu, "cpu")
    assert record.read_pair("double", for_gpu.version) == for_gpu and for_gpu.status == "recorded"


def test_an_image_for_a_gpu_is_held_against_the_cpu_of_the_same_machine(for_gpu, pretended, tracking):
    "Two real containers; the driver's library and the model are stand-ins"
    from mlflow import MlflowClient

    from mlserve.errors import CheckFailed
    from mlserve.release import record
    found = pretended(20, 20, "cpu")
    assert found.passed and list(found.speed) == ["cpu"], told(found)
    for device in (None, "cpu"):
        with pytest.raises(CheckFailed, match="has not passed on cuda"):
            record.promote("double", for_gpu.version, device)
    found = pretended(3, 100)
    assert found.passed and found.placement["parameters"] == {"cuda:0": 1} and not any("GPU" in w for w in found.warnings), told(found)
    assert set(found.speed) == {"cuda", "cpu"}, told(found)
    assert min(found.speed["cpu"]["model_ms"]) >= 100 > max(found.speed["cuda"]["model_ms"]), told(found)  # it sleeps: load makes it longer, never shorter
    metrics = MlflowClient(tracking_uri=tracking).get_run(for_gpu.run_id).data.metrics
    assert metrics["check.cuda.model_ms"] == found.speed["cuda"]["model_ms"][-1] and metrics["check.cpu.model_ms"] == found.speed["cpu"]["model_ms"][-1]
    assert record.promote("double", for_gpu.version).version == for_gpu.version


def test_a_gpu_that_is_slower_than_the_cpu_fails_the_check(for_gpu, pretended):
    from mlserve.errors import CheckFailed
    from mlserve.release import record
    found = pretended(200, 10)
    assert (found.passed, found.code) == (False, 3) and "for a batch of 32 on the GPU" in found.reason and set(found.speed) == {"cuda", "cpu"}, told(found)
    with pytest.raises(CheckFailed, match="has not passed on cuda"):
        record.promote("double", for_gpu.version)


def test_a_release_says_each_step_when_it_starts_and_when_it_ends(environment, release):
    "Of a release that fails while it trains"
    done = mlserve("release", EXAMPLE.parent.parent.parent / "tests/notebooks/raises.ipynb", env=environment)
    said = [line.split() for line in done.stderr.splitlines()]
    assert ["train", "…"] in said and said.index(["reach", "…"]) < said.index(["train", "…"])


def test_hardened_it_becomes_healthy_and_answers_as_the_notebook_did(release, start, tracking, monkeypatch):
    import mlflow
    from mlserve.client import Client
    from mlserve.package import golden, load_package
    from mlserve.tensors import compare
    container = start(release["image"], *HARDENED, "--user", "10001:10001")
    wait_healthy(container)
    mlflow.set_tracking_uri(tracking)
    path = mlflow.artifacts.download_artifacts(f"models:/digits/{release['version']}")
    package = load_package(path, digest=release["package"])
    inputs, outputs = golden(package)
    assert compare(outputs, Client(address(container)).infer(inputs), **package.tolerance).passed
    assert docker_cli("diff", container.id).stdout == ""


def test_cuda_without_a_gpu_is_refused_within_ten_seconds(release, start):
    began = time.monotonic()
    container = start(release["image"], "-e", "MLSERVE_DEVICE=cuda")
    assert container.wait(timeout=20)["StatusCode"] == 9
    assert time.monotonic() - began < 10
    assert "--gpus" in container.logs().decode()


def test_a_flipped_byte_in_a_mounted_package_is_refused(release, start, tracking, tmp_path):
    path = damaged(release, tracking, tmp_path)
    container = start(release["image"], "-v", f"{path}:/models/package:ro")
    assert container.wait(timeout=30)["StatusCode"] == 5
    assert "model.pt" in container.logs().decode()


def test_no_container_is_left(release, engine):
    "Those of a check that another run is making just now go by themselves"
    def checked():
        return {c.id for c in engine.containers.list(all=True, ignore_removed=True) if "mlserve-check" in (c.attrs["HostConfig"].get("NetworkMode") or "")}
    seen = checked()
    until(lambda: not seen & checked(), 60)


def test_the_readme_query_is_true(release, start):
    "The query of the README, sent to the released image, gives the answer's shape and class"
    import re
    from commands import ROOT
    blocks = re.findall(r"```(?:json|bash|text|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    query = next(b for b in blocks if "/predict" in b)
    body = re.search(r"'(\{.*\})'", query, re.S)[1]
    answer = json.loads(re.search(r"\{\"outputs\".*\}", "\n".join(blocks), re.S)[0].splitlines()[0])
    container = start(release["image"])
    wait_healthy(container)
    got = httpx.post(address(container) + "/predict", content=body, headers={"Content-Type": "application/json"}, trust_env=False).json()
    assert np.shape(got["outputs"]) == np.shape(answer["outputs"])
    assert np.argmax(got["outputs"], -1).tolist() == np.argmax(answer["outputs"], -1).tolist()


@pytest.mark.parametrize("variables", [["MLSERVE_PORT=9123", "MLSERVE_HOST=::"], ["SAGEMAKER_BIND_TO_PORT=9124", "MLSERVE_METRICS_PORT=tcp://10.0.0.7:80", "MLSERVE_PORT_80_TCP=tcp://10.0.0.7:80"]], ids=lambda v: v[0])
def test_the_health_check_of_an_image_asks_where_its_server_listens(variables, release, start, engine):
    "An address, a port and service links that the image did not know"
    container = start(release["image"], *(word for v in variables for word in ("-e", v)))
    wait_healthy(container)
    port = variables[0].partition("=")[2]
    assert f"port {port}: HTTP/1.1 200 OK" in container.attrs["State"]["Health"]["Log"][-1]["Output"]
    assert engine.images.get(release["image"]).labels["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"


def test_a_change_of_serving_code_rebuilds_only_the_code_layer(release, engine, environment, tmp_path):
    "Same package, one changed line: every layer but the last is the same"
    import shutil
    package = tmp_path / "package"
    import mlflow
    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    mlflow.artifacts.download_artifacts(f"models:/digits/{release['version']}", dst_path=str(package))
    (package / "registered_model_meta").unlink(missing_ok=True)
    code = tmp_path / "src"
    import mlserve as installed
    from pathlib import Path
    shutil.copytree(Path(installed.__file__).parent, code / "mlserve", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(EXAMPLE.parent.parent / "pipelines", code / "mlserve/pipelines")  # as a wheel carries them
    with open(code / "mlserve/serving/http/app.py", "a") as f:
        f.write("\n# one changed line\n")
    began = time.monotonic()
    done = mlserve("build", EXAMPLE, "--package", package, "--json", env={**environment, "PYTHONPATH": str(code)})
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-3000:]
    changed = json.loads(done.stdout)["image"]
    print(f"the whole command took {seconds:.1f} s, its build step {json.loads(done.stdout)['seconds']} s")  # measured by people, not asserted
    assert changed != release["image"]
    old, new = (engine.images.get(i).attrs["RootFS"]["Layers"] for i in (release["image"], changed))
    assert old[:-1] == new[:-1] and old[-1] != new[-1]


def test_the_debug_image_has_the_layers_of_the_release_and_a_shell(release, engine, environment, state, tmp_path, monkeypatch):
    "`docker build --target debug` of the same context: the same layers on a base, root, and /bin/sh"
    import mlflow
    from mlserve.package import load_package
    from mlserve.release.plan import build_image, prepare
    from mlserve.release.spec import ReleaseSpec
    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    mlflow.artifacts.download_artifacts(f"models:/digits/{release['version']}", dst_path=str(tmp_path / "package"))
    (tmp_path / "package/registered_model_meta").unlink(missing_ok=True)
    package = load_package(tmp_path / "package", release["package"])
    plan = prepare(ReleaseSpec(name="digits", notebook=EXAMPLE, base=os.environ["MLSERVE_BASE"], state=state), package)
    debug, production = (build_image(plan, tmp_path / "contexts", stage=stage) for stage in ("debug", "production"))
    try:
        debug_layers, layers, released = (engine.images.get(i).attrs["RootFS"]["Layers"] for i in (debug.id, production.id, release["image"]))
        assert debug_layers[-len(layers):] == layers and layers[:-1] == released[:-1] and len(debug_layers) > len(layers)
        look = "id -u; ls /models/package/MLmodel; /opt/venv/bin/python -c 'import mlserve.serving.server as s; print(s.__file__)'"
        said = engine.containers.run(debug.id, ["-c", look], network_mode="none", remove=True).decode().split()
        assert said == ["0", "/models/package/MLmodel", "/opt/mlserve/mlserve/serving/server.py"]
    finally:
        for built in (debug, production):
            engine.images.remove(built.id, force=True)


@pytest.mark.matrix
def test_a_package_on_a_volume_releases_without_weights_in_the_image(environment, release, start):
    "The same notebook delivered by volume: the check mounts the recorded package, the image holds none"
    done = mlserve("release", EXAMPLE.parent.parent.parent / "tests/notebooks/good.ipynb", "--delivery", "volume", "--json", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["aliases"] == ["candidate"]
    done = mlserve("check", "good", "--json", env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["delivery"] == "volume", done.stderr[-3000:]
    container = start(result["image"])
    assert container.wait(timeout=30)["StatusCode"] == 7
    assert "/models/package" in container.logs().decode()


@pytest.mark.matrix
def test_large_weights_inside_an_image_are_warned_about(environment, release, tmp_path):
    "A package of 501 MB is built, and the way out is named on stderr and in the result; the sentence itself is told on the page of the spec"
    import torch
    from mlserve.package.lock import write_lock
    from mlserve.package import save_package
    package = save_package(torch.nn.Linear(4, 1).eval(), tmp_path / "package", name="large", inputs={"x": torch.rand(8, 4)}, outputs=["y"])
    (package.path / "files").mkdir(mode=0o755)
    with open(package.path / "files/table.bin", "wb") as f:
        f.truncate(501 * 10**6)
    write_lock(package.path)
    done = mlserve("build", EXAMPLE, "--package", package.path, "--name", "large", "--json", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    [warning] = json.loads(done.stdout)["warnings"]
    assert warning.startswith("501 MB") and all(d in warning for d in ("'volume'", "'store'", "'registry'"))
    assert f"warning: {warning}" in done.stderr
    assert release["warnings"] == []
