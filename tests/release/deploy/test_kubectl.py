"""What is understood of the answers of kubectl: words that a real one printed, of 1.20 and of newer ones, and programs in its place that misbehave."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlserve.errors import MlserveError
from mlserve.release.deploy.kubernetes.kubectl import Kubectl, find_kubectl, kubectl_failure

FORBIDDEN = 'Error from server (Forbidden): '
# exit code · what kubectl printed on stderr
SAID = [
    (6, "The connection to the server 127.0.0.1:1 was refused - did you specify the right host or port?"),
    (6, "Unable to connect to the server: dial tcp: lookup nowhere.invalid on 10.255.255.53:53: no such host"),
    (6, "Unable to connect to the server: net/http: request canceled while waiting for connection (Client.Timeout exceeded while awaiting headers)"),
    (6, "Unable to connect to the server: x509: certificate signed by unknown authority"),
    (6, "error: You must be logged in to the server (Unauthorized)"),
    (6, FORBIDDEN + 'pods is forbidden: User "ci" cannot list resource "pods" in API group "" in the namespace "mlserve-test"'),
    (6, FORBIDDEN + 'namespaces is forbidden: User "ci" cannot create resource "namespaces" in API group "" at the cluster scope'),
    (6, "Error from server (ServiceUnavailable): the server is currently unable to handle the request"),
    (6, "Error from server: etcdserver: request timed out"),
    (6, "Error from server: etcdserver: leader changed"),
    (7, "Error in configuration: context was not found for specified context: prod"),
    (7, 'error: context "prod" does not exist'),
    (7, 'Unable to connect to the server: getting credentials: exec: executable aws not found'),
    (7, FORBIDDEN + 'pods "x" is forbidden: exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=0'),
    (8, FORBIDDEN + 'pods "double-5d8" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true'),
    (8, 'Error from server: error when creating "STDIN": admission webhook "validate.kyverno.svc-fail" denied the request: resource was blocked'),
    (4, 'The Deployment "d" is invalid: spec.selector: Invalid value: v1.LabelSelector{MatchLabels:map[string]string{"a":"c"}, MatchExpressions:[]v1.LabelSelectorRequirement(nil)}: field is immutable'),
    (4, FORBIDDEN + 'error when creating "STDIN": deployments.apps "double" is forbidden: unable to create new content in namespace mlserve because it is being terminated'),
    (2, 'The Deployment "d" is invalid: spec.template.spec.containers[0].resources.requests: Invalid value: "9": must be less than or equal to cpu limit'),
    (2, 'error: error validating "STDIN": error validating data: ValidationError(Deployment.spec): unknown field "imagge" in io.k8s.api.core.v1.Container'),
    (2, 'error: unable to recognize "STDIN": no matches for kind "PodDisruptionBudget" in version "policy/v1"'),
    (2, 'Error from server (NotFound): error when creating "STDIN": namespaces "nowhere" not found'),
    (6, "error trying to reach service: dial tcp 10.0.0.7:8080: i/o timeout"),
]


@pytest.mark.parametrize("code, said", SAID)
def test_what_kubectl_says_becomes_the_failure_that_it_means(code, said):
    error = kubectl_failure(f"Warning: policy/v1beta1 is deprecated\n{said}\n", "prod")
    assert error.code == code and said.rstrip(". ") in error.message and "cluster prod" in error.message and "Warning" not in error.message, error


def test_of_a_patch_that_was_refused_the_reason_is_told_and_not_the_patch():
    said = """Error from server (Conflict): error when applying patch:
{"metadata":{"annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{}"}},"status":{"conditions":[]}}
to:
Resource: "apps/v1, Resource=deployments", GroupVersionKind: "apps/v1, Kind=Deployment"
Name: "double", Namespace: "mlserve-test"
for: "STDIN": Operation cannot be fulfilled on deployments.apps "double": the object has been modified; please apply your changes to the latest version and try again
"""
    error = kubectl_failure(said, "prod")
    assert error.code == 4 and "the object has been modified" in error.message and "annotations" not in error.message and "Resource:" not in error.message


def test_words_that_nobody_knows_are_told_as_they_are():
    error = kubectl_failure("panic: runtime error", "prod")
    assert error.code == 7 and "panic: runtime error" in error.message
    assert "printed nothing" in kubectl_failure("").message


def stand_in(folder, *lines):
    path = folder / "kubectl"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("lines, code, words", [
    (["exec sleep 60"], 6, "did not end within 0.5 s"), (["sleep 60 & wait"], 6, "did not end within 0.5 s"), (["kill -9 $$"], 7, "killed by signal 9"),
    (["echo '{\"items\": ['"], 6, "printed no JSON"), (["exit 3"], 7, "printed nothing")])
def test_a_kubectl_that_misbehaves_ends_as_a_failure_of_ours_and_leaves_no_process(tmp_path, lines, code, words):
    kubectl = Kubectl("prod", "mlserve", program=stand_in(tmp_path, f"echo $$ >{tmp_path}/pid", *lines))
    begun = time.monotonic()
    with pytest.raises(MlserveError) as e:
        kubectl.call("get", "pods", seconds=0.5)
        kubectl.read("get", "pods")
    assert e.value.code == code and words in str(e.value)
    assert time.monotonic() - begun < 30, "nobody waits for what a killed kubectl has started"
    pid = (tmp_path / "pid").read_text().strip()
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_a_command_that_is_killed_leaves_the_lock_with_the_kubectl_that_goes_on(tmp_path, monkeypatch):
    "kubectl applies for a moment longer; the next command waits for that, and does not look at half of it"
    program = stand_in(tmp_path, f"touch {tmp_path}/begun", f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done", f"touch {tmp_path}/over")
    script = f"""
import os
from mlserve.release.deploy.kubernetes.kubectl import Kubectl
from mlserve.release.deploy.live.target import alone
with alone("kubernetes-x") as guard:
    Kubectl("prod", "mlserve", (guard,), {program!r}).call("apply")
"""
    monkeypatch.setenv("MLSERVE_STATE", str(tmp_path / "state"))
    process = subprocess.Popen([sys.executable, "-c", script])
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    from mlserve.release.deploy.live.target import alone
    with pytest.raises(MlserveError, match="Another command deploys to kubernetes-x"), alone("kubernetes-x", 0.5):
        pass
    (tmp_path / "go").touch()
    with alone("kubernetes-x", 60):
        assert (tmp_path / "over").exists()


def test_a_cluster_is_named_in_every_call_and_never_through_a_shell(tmp_path):
    program = stand_in(tmp_path, 'case "$2" in get-contexts) printf "prod\\nstaging\\n";; current-context) echo staging;; *) printf "%s\\n" "$@";; esac')
    named, current = find_kubectl("prod", "mlserve", program=program), find_kubectl("", "mlserve", program=program)
    assert (named.context, current.context) == ("prod", "staging")
    words = named.call("get", "pods; rm -rf /", "$(id)").splitlines()
    assert words[:4] == ["--context", "prod", "--namespace", "mlserve"] and words[-2:] == ["pods; rm -rf /", "$(id)"]
    assert not any(word.startswith("--request-timeout") for word in named.call("get", "--raw", "/version").splitlines()), "it would be asked of the pod"


def test_inside_a_cluster_no_context_is_needed(tmp_path, monkeypatch):
    program = stand_in(tmp_path, '[ "$1" != config ] || exit 1', 'printf "%s\\n" "$@"')
    with pytest.raises(MlserveError, match="does not have a current context; it has: none"):
        find_kubectl("", "mlserve", program=program)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    found = find_kubectl("", "mlserve", program=program)
    assert found.context == "" and found.call("get").splitlines()[:2] == ["--namespace", "mlserve"]


ANSWER = json.loads((Path(__file__).parent / "golden/kubectl-get.json").read_text())


def test_a_real_answer_in_the_middle_of_a_rollout_is_understood():
    "Recorded of a server of 1.20: three pods of version 3, one of version 7 whose container ended"
    from mlserve.release.deploy.kubernetes.cluster import Cluster

    class Recorded:
        namespace, context = "mlserve-test", "test"

        def read(self, *words, given=""):
            assert words[:3] == ("get", "deployments.apps,pods", "--selector")
            return ANSWER["items"]
    view = Cluster(Recorded(), "kubernetes-double").look()
    assert (view.work.version, view.work.wanted, view.work.new, view.work.ready, view.work.all, view.work.seen, view.work.done) == ("7", 3, 1, 3, 4, True, False)
    assert sorted((seen.version, seen.health, seen.route) for seen in view.running) == [("3", "healthy", "open")] * 3 + [("7", "ended", "closed")]
    assert {seen.engine for seen in view.running} == {"kubernetes"} and all(seen.image.count("@sha256:") == 1 and seen.since for seen in view.running)


def test_kubectl_is_looked_for_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MlserveError, match="kubectl is not on this machine") as e:
        find_kubectl("", "mlserve")
    assert e.value.code == 7
    (tmp_path / "kubectl").write_text("not a program")
    os.chmod(tmp_path / "kubectl", 0o755)
    with pytest.raises(MlserveError, match="kubectl cannot be run") as e:
        find_kubectl("", "mlserve")
    assert e.value.code == 7
