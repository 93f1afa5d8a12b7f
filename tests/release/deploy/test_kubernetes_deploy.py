"""`mlserve deploy kubernetes` against a real control plane of Kubernetes 1.20: an API server with its store and controllers, kubectl, and a node in the test's hands.

The node tells what a kubelet would: a pod of a good image has an address where a real server answers who it is, and is ready; those of bad images do what
bad images do. The scenarios are the same as those of `make test`, where a stand-in for kubectl answers."""
import base64
import contextlib
import json
import os
import subprocess
import threading
import time

import pytest
import yaml
from cluster import BIN, control_plane
from kubelet import READY, page_of, status_of, who
from kubernetes_scenarios import (  # noqa: F401 (the tests are run in this world too)
    NAMESPACE, World, asked, deploy, environment, registry, served,
    test_a_canary_gets_its_share_by_the_number_of_pods_and_goes_back_or_takes_all,
    test_an_autoscaled_target_keeps_its_number_of_pods_from_version_to_version,
    test_L6_R9_versions_replace_each_other_and_each_bad_one_is_taken_back_by_its_cause,
    test_only_what_is_of_the_target_is_touched,
    test_R9_a_bad_version_whose_command_was_killed_is_taken_back_by_the_next_one,
    test_R9_a_command_that_is_killed_leaves_one_serving_and_the_same_command_ends_well,
    test_R9_a_target_that_somebody_else_changes_meanwhile_is_theirs,
    test_status_and_logs_say_what_runs_in_the_cluster,
    test_what_cannot_be_deployed_is_refused_before_anything_is_touched)
from servers import until

STRATEGIC = {"content-type": "application/strategic-merge-patch+json"}


class Node(threading.Thread):
    "Tells of the pods of a cluster, and has a server for each that is ready"
    NET = "198.18.7"  # for benchmarks; an API server sends no request to a loopback address

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.cluster, self.images, self.servers, self.told, self.going, self.next = cluster, {}, {}, set(), True, 1
        subprocess.run(["ip", "route", "replace", "local", f"{self.NET}.0/24", "dev", "lo"], check=True)

    def tell(self, pod, name, kind):
        status = status_of(pod, kind)
        if kind in READY and name not in self.servers:
            page, ip = page_of(pod, kind).encode(), f"{self.NET}.{self.next}"
            self.next = self.next % 250 + 1
            self.servers[name] = served(lambda path: page if path.startswith("/metrics") else None, (ip, 8080))
        if name in self.servers:
            ip = self.servers[name].server_address[0]
            status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
        path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{name}/status"
        if self.cluster.http.patch(path, json={"status": status}, headers=STRATEGIC).status_code == 200:
            self.told.add(name)

    def tick(self):
        pods = self.cluster.http.get("/api/v1/pods", params={"labelSelector": "app.kubernetes.io/managed-by=mlserve"}).json()["items"]
        for gone in set(self.servers) - {pod["metadata"]["name"] for pod in pods}:
            self.servers.pop(gone).shutdown()
        for pod in pods:
            name = pod["metadata"]["name"]
            if name not in self.told and "deletionTimestamp" not in pod["metadata"]:
                self.tell(pod, name, self.images.get(who(pod)[1].split("@")[1], "good"))

    def run(self):
        while self.going:
            with contextlib.suppress(Exception):  # a pod went away meanwhile
                self.tick()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with control_plane(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="module")
def world(cluster, double, tmp_path_factory):
    "The control plane, a node, and kubectl on the path"
    home, node = tmp_path_factory.mktemp("deploy"), Node(cluster)
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "test", "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
              "clusters": [{"name": "c", "cluster": {"server": cluster.url, "insecure-skip-tls-verify": True}}], "users": [{"name": "u", "user": {"token": "secret"}}]}
    (home / "config").write_text(yaml.safe_dump(config))
    with environment(home, KUBECONFIG=home / "config", PATH=f"{BIN}:{os.environ['PATH']}"), registry() as image_of:
        world = World(node.images.__setitem__)
        world.record(image_of, double)
        node.start()
        yield world
        node.going = False
        node.join()
    subprocess.run(["ip", "route", "del", "local", f"{Node.NET}.0/24", "dev", "lo"], check=False)


def test_a_server_that_refuses_says_so_in_its_own_words_and_nothing_is_applied(world):
    "A quota, as a team has one: the rehearsal passes, since it counts only what is stored; the pods are refused"
    versions = world.versions
    assert deploy(versions["one"])[0] == 0
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team", "namespace": NAMESPACE}, "spec": {"hard": {"limits.memory": "3Gi", "requests.cpu": "99"}}}
    world.add(quota)
    until(lambda: json.loads(world.kubectl("get", "resourcequota", "team", "-n", NAMESPACE, "-o", "json")).get("status", {}).get("used", {}).get("limits.memory") == "3Gi", 30)
    code, _, told = deploy(versions["two"])
    assert code == 7 and told["step"] == "healthy" and "exceeded quota" in told["error"] and f"Version {versions['one']} keeps serving" in told["error"], told
    world.clean(versions["one"])
    world.remove([quota])
    assert deploy(versions["two"])[0] == 0
    world.clean(versions["two"])


@pytest.fixture
def account(world, tmp_path):
    "An account with the Role that the page shows, in a namespace that somebody made; its kubeconfig"
    from mlserve.release.deploy.kubernetes.cluster import deployer_role
    name, namespace = "ci", "mlserve-rights"
    role = deployer_role(namespace)
    world.add({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    world.add({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}})
    world.add(role)
    world.add({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": name, "namespace": namespace}, "subjects": [{"kind": "ServiceAccount", "name": name}],
               "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role["metadata"]["name"]}})

    def token():
        secrets = json.loads(world.kubectl("get", "secrets", "-n", namespace, "-o", "json"))["items"]
        return next((s["data"]["token"] for s in secrets if s["metadata"].get("annotations", {}).get("kubernetes.io/service-account.name") == name and "token" in s.get("data", {})), "")
    until(token, 60)
    config = yaml.safe_load(open(os.environ["KUBECONFIG"]))
    config["users"][0]["user"]["token"] = base64.b64decode(token()).decode()
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    return tmp_path / "config", role


def test_an_account_with_the_role_of_the_page_deploys_and_without_a_part_of_it_is_told_which(world, account, monkeypatch):
    versions, (config, role) = world.versions, account
    monkeypatch.setenv("KUBECONFIG", str(config))
    for version, expected in (("righted", 0), ("rightly", 0), ("righted", 0)):
        code, _, told = deploy(versions[version], "--target", "rights")
        assert code == expected, told
    code, _, told = deploy(versions["one"], "--target", "strange")
    assert code == 6 and "cannot" in told["error"] and 'in the namespace "mlserve-test"' in told["error"] and "auth can-i" in told["error"], told
    role["rules"] = [{**rule, "resources": [kind for kind in rule["resources"] if kind != "pods/proxy"]} for rule in role["rules"]]
    monkeypatch.undo()
    world.add(role)
    monkeypatch.setenv("KUBECONFIG", str(config))
    code, _, told = deploy(versions["rightly"], "--target", "rights")
    assert code == 6 and told["step"] == "identity" and "pods/proxy (get)" in told["error"] and f"Version {versions['righted']} keeps serving" in told["error"], told
    [work] = world.objects("deployments", "app.kubernetes.io/instance=rights", "mlserve-rights")
    assert work["metadata"]["annotations"]["mlserve.io/version"] == versions["righted"]
