"""What we render, given to a real control plane of Kubernetes 1.20: an API server with its store and controllers, and nodes only in the test's hands.

The schemas of newer versions are asked elsewhere; here is what no schema has: the server's own rules, its defaults, and what the controllers do. 1.20 is
what can be built here; it lacks three things that we write, which are put into its words first. Pods become ready when the test says so."""
import json
import time

import pytest
import yaml
from cluster import control_plane, in_older_words, of
from plans import CASES, planned
from servers import until

from mlserve.release.deploy.rendering import to_text

VERSIONS = [version for version, engine in CASES if engine == "kubernetes"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with control_plane(tmp_path_factory.mktemp("cluster")) as made:
        yield made


def rendered(version):
    return list(yaml.safe_load_all(to_text(planned(version, "kubernetes"))))


def within(sent, stored):
    "Whether all that was sent is stored as it was sent; numbers of memory and processors may be spelled otherwise"
    if isinstance(sent, dict):
        return [f"{key}.{w}" for key, value in sent.items() for w in (within(value, stored[key]) if key in stored else ["is gone"] if value else [])]
    if isinstance(sent, list):
        return [w for a, b in zip(sent, stored, strict=True) for w in within(a, b)]
    return [] if str(sent) == str(stored) else [f" was {sent}, is {stored}"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_takes_what_is_rendered_and_keeps_every_field(cluster, version):
    documents = in_older_words(rendered(version))
    cluster.empty(documents)
    code, told = cluster.apply(documents, "--dry-run=server")
    assert code == 0, told
    code, told = cluster.apply(documents)
    assert code == 0, told
    for document in documents:
        stored = json.loads(cluster.kubectl("get", "-o", "json", "-f", "-", given=yaml.safe_dump(document))[1])["items"][0]
        assert (stored["kind"], stored["apiVersion"]) == (document["kind"], document["apiVersion"])
        wrong = [w for w in within(document["spec"], stored["spec"]) if ".cpu" not in w and "memory" not in w] if "spec" in document else []
        assert not wrong, (document["kind"], wrong)


def test_what_this_old_server_does_not_know_is_told_by_name(cluster):
    documents = rendered("digits")
    assert cluster.apply([of(documents, "Namespace")])[0] == 0
    for kind, words in (("Deployment", 'unknown field "matchLabelKeys"'), ("PodDisruptionBudget", 'no matches for kind "PodDisruptionBudget" in version "policy/v1"'),
                        ("HorizontalPodAutoscaler", 'no matches for kind "HorizontalPodAutoscaler" in version "autoscaling/v2"')):
        found = [d for d in documents if d["kind"] == kind] or [d for d in rendered("registry") if d["kind"] == kind]
        code, told = cluster.apply(found, "--dry-run=server")
        assert code == 1 and words in told, told


def test_control_a_server_refuses_what_schemas_let_through(cluster):
    documents = in_older_words(rendered("digits"))
    assert cluster.apply([of(documents, "Namespace")])[0] == 0
    work = of(documents, "Deployment")
    container = work["spec"]["template"]["spec"]["containers"][0]
    container["resources"]["requests"] = {"memory": "99Gi", "cpu": "99"}
    container["startupProbe"]["successThreshold"] = 3
    work["spec"]["selector"]["matchLabels"] = {"app.kubernetes.io/name": "another"}
    code, told = cluster.apply([work], "--dry-run=server")
    assert code == 1 and all(words in told for words in ("must be less than or equal to", "must be 1", "`selector` does not match")), told


def test_a_bad_version_leaves_the_one_before_and_the_earlier_file_applied_again_brings_it_back(cluster):
    "Deployment with maxSurge 1 and maxUnavailable 0: an image that never becomes ready takes nothing away; `undo` is not needed"
    first = in_older_words(rendered("digits"))
    name, count = of(first, "Deployment")["metadata"]["name"], 3
    of(first, "Deployment")["spec"]["replicas"] = count
    first = [d for d in first if d["kind"] != "HorizontalPodAutoscaler"]
    good = of(first, "Deployment")["spec"]["template"]["spec"]["containers"][0]["image"]
    bad = good[:-64] + "b" * 64
    second = json.loads(json.dumps(first).replace(good, bad))

    def images():
        return sorted(p["spec"]["containers"][0]["image"] for p in cluster.pods())

    def rolled_out(seconds):
        return cluster.kubectl("rollout", "status", f"deployment/{name}", "-n", "mlserve", f"--timeout={seconds}s")
    cluster.empty(first)
    assert cluster.apply(first)[0] == 0
    until(lambda: images() == [good] * count, 30)
    cluster.ready(good)
    begun = time.monotonic()
    assert rolled_out(60)[0] == 0
    assert cluster.apply(second)[0] == 0
    until(lambda: bad in images(), 30)
    code, told = rolled_out(5)
    assert code == 1 and "timed out" in told
    assert images() == sorted([good] * count + [bad]), "one more beside all of the old"
    assert cluster.apply(first)[0] == 0
    cluster.ready(good)
    code, told = rolled_out(60)
    assert code == 0, told
    until(lambda: images() == [good] * count, 30)
    print(f"{time.monotonic() - begun:.1f} s from the first that was ready to the last of the bad ones gone")
    sets = json.loads(cluster.kubectl("get", "replicasets", "-n", "mlserve", "-o", "json")[1])["items"]
    assert sorted(s["spec"]["replicas"] for s in sets if s["spec"]["template"]["spec"]["containers"][0]["image"] in (good, bad)) == [0, count]
