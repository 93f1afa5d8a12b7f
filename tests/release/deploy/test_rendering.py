"""Files for engines: the golden ones, the schemas of those who read them, linters, and rules that no schema has.

`python tests/release/deploy/plans.py` writes the golden files again."""
import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jsonschema
import pytest
import yaml
from commands import TESTS, last_json
from plans import CASES, FINDING, GOLDEN, KEPT, PROXY, planned

from mlserve.cli import run_command
from mlserve.release.deploy import rendering
from mlserve.release.deploy.deployment import ENGINES
from mlserve.release.deploy.render.haproxy import haproxy_config
from mlserve.release.deploy.rendering import file_documents, to_text

CFN_LINT = Path(sys.executable).parent / "cfn-lint"
SCHEMAS = {name: json.loads((TESTS / f"schemas/{name}.json").read_text()) for name in ("compose", "stack", "kserve")}
TEXTS = {(version, engine): to_text(planned(version, engine)) for version, engine in CASES}
of = lambda *engines: [pytest.param(*case, id="-".join(case)) for case in CASES if case[1] in engines]
each = pytest.mark.parametrize("version, engine", of(*ENGINES))


READ = {case: list(yaml.safe_load_all(text)) for case, text in TEXTS.items()}


def read(version, engine):
    "What a file says, to be changed"
    return copy.deepcopy(READ[version, engine])


# ---- the text


@each
def test_what_is_read_back_is_what_was_meant(version, engine):
    "The same dictionaries, the same bytes at the second call, and nothing that a reader resolves"
    assert read(version, engine) == list(file_documents(planned(version, engine)))
    assert to_text(planned(version, engine)) == TEXTS[version, engine]
    assert not re.search(r"^\s*[&*]id\d|!!", TEXTS[version, engine], re.M) and "None" not in TEXTS[version, engine]


@pytest.mark.parametrize("version, engine", KEPT)
def test_the_golden_files_are_what_is_rendered(version, engine):
    assert (GOLDEN / f"{engine}-{version}.yaml").read_text() == TEXTS[version, engine]


@each
def test_version_image_and_package_are_known_to_every_container(version, engine):
    d = planned(version, engine)
    for name, value in (("MODEL_VERSION", d.version), ("IMAGE", d.image), ("PACKAGE_DIGEST", d.package)):
        pairs = re.findall(rf"MLSERVE_{name}(?:: |\n\s+[vV]alue: )(\S+)", TEXTS[version, engine])
        assert pairs and {p.strip("'") for p in pairs} == {value}, pairs
    images = re.findall(r"^\s*(?:- )?[iI]mage: (\S+)$", TEXTS[version, engine], re.M)
    assert set(images) - {PROXY} == {d.image} and all(re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", i) for i in images)


@pytest.mark.parametrize("name", ["o'neil", 'a"b', "{x}", "a: b", "$HOME", "a\nb", "- x", "#x", "&a", "!!python/object", "ü", "null", "1e3"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_name_that_means_something_in_yaml_stays_a_name(name, engine):
    "Names are checked long before; a rendering does not count on it"
    d = replace(planned("digits", engine), model=name)
    assert list(yaml.safe_load_all(to_text(d))) == list(file_documents(d))


# ---- the schemas


def strict(schema):
    "A schema of Kubernetes in which a field that it does not know is an error"
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    if made.pop("x-kubernetes-int-or-string", None):
        made = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return made


KSERVE = {kind: strict(schema) for kind, schema in SCHEMAS["kserve"].items() if kind != "$comment"}
for schema in KSERVE.values():  # what the server itself adds to every object
    schema["properties"]["metadata"] = {"type": "object"}


def faults_of(schema, document):
    return [f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in jsonschema.Draft202012Validator(schema).iter_errors(document)]


@pytest.mark.parametrize("version, engine", of("compose"))
def test_compose_files_have_the_shape_of_the_specification(version, engine):
    [file] = read(version, engine)
    assert faults_of(SCHEMAS["compose"], file) == []
    file["services"]["model"]["gpu"] = "all"
    assert faults_of(SCHEMAS["compose"], file)


@pytest.mark.parametrize("version, engine", of("swarm"))
def test_stack_files_have_the_shape_of_their_version(version, engine):
    [file] = read(version, engine)
    schema = jsonschema.Draft4Validator(SCHEMAS["stack"])
    assert [e.message for e in schema.iter_errors(file)] == []
    file["services"]["model"]["gpus"] = "all"
    assert list(schema.iter_errors(file))


@pytest.mark.parametrize("version, engine", of("kserve"))
def test_kserve_objects_have_the_shape_of_its_definitions(version, engine):
    objects = [o for o in read(version, engine) if o["kind"] in KSERVE]
    assert [o["kind"] for o in objects] == ["ServingRuntime", "InferenceService"]
    assert [fault for o in objects for fault in faults_of(KSERVE[o["kind"]], o)] == []
    objects[1]["spec"]["predictor"]["containers"][0]["livenessprobe"] = {}
    assert any("livenessprobe" in fault for fault in faults_of(KSERVE["InferenceService"], objects[1]))


def test_kubernetes_objects_pass_a_strict_validation(kubernetes_validate, tmp_path):
    "All of Kubernetes' own kinds, and a field that does not exist is found"
    files = []
    for version, engine in [c for c in CASES if c[1] == "kubernetes"] + [("digits", "kserve")]:
        files.append(tmp_path / f"{engine}-{version}.yaml")
        files[-1].write_text(yaml.safe_dump_all([o for o in read(version, engine) if "kserve" not in o["apiVersion"]]))
    assert kubernetes_validate(*files) == {}
    documents = read("digits", "kubernetes")
    workload(documents)["spec"]["strategy"]["rollingUpdate"]["maxSurges"] = 1
    files[0].write_text(yaml.safe_dump_all(documents))
    assert list(kubernetes_validate(files[0])) == [files[0].name]


def test_cloudformation_templates_have_no_finding(tmp_path):
    "Warnings count; and a pair of cores and memory that Fargate does not sell is found"
    for case in [c for c in CASES if c[1] in ("ecs", "sagemaker")]:
        (tmp_path / f"{'-'.join(case)}.yaml").write_text(TEXTS[case])
    done = subprocess.run([CFN_LINT, *tmp_path.iterdir()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "bad.yaml").write_text(TEXTS["digits", "ecs"].replace("Memory: '4096'", "Memory: '1024'"))
    assert "E3047" in subprocess.run([CFN_LINT, tmp_path / "bad.yaml"], capture_output=True, text=True).stdout


def test_checkov_has_no_finding(checkov, tmp_path):
    "Two rules are answered in the files, where a package is fetched; and a container that may write is found"
    for case in [c for c in CASES if c[1] not in ("compose", "swarm")]:
        (tmp_path / f"{'-'.join(case)}.yaml").write_text(TEXTS[case])
    (tmp_path / "bad.yaml").write_text(TEXTS["digits", "kubernetes"].replace("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"))
    summary, failed = checkov(tmp_path, "kubernetes", "cloudformation")
    assert failed == [("CKV_K8S_22", "/bad.yaml")] and summary["passed"] > 400 and summary["skipped"] == 4 and not summary["parsing_errors"], (failed, summary)


@pytest.mark.parametrize("version, engine", of("compose", "swarm"))
def test_haproxy_reads_its_configuration_without_a_warning(version, engine, tmp_path):
    [file] = read(version, engine)
    config = file["services"]["proxy"]["environment"]["HAPROXY_CONFIG"]
    assert config == haproxy_config(planned(version, engine), "model" if engine == "compose" else "tasks.model")
    (tmp_path / "haproxy.cfg").write_text(config)
    done = subprocess.run(["haproxy", "-c", "-V", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    retries = re.findall(r"^\s*retry-on (.*)$", config, re.M)
    assert retries == ["conn-failure"]


def test_a_port_for_grpc_leads_to_the_port_of_the_container():
    "From what clients ask, by the proxy or the service, to what the server opens"
    for engine in D:
        [file] = read("grpc", engine)
        model, proxy = file["services"]["model"], file["services"]["proxy"]
        [asked] = [p for p in proxy["ports"] if str(p["published"]) == "8081"]
        config = proxy["environment"]["HAPROXY_CONFIG"]
        assert f"bind :{asked['target']} proto h2" in config and f"server-template s 8 {'model' if engine == 'compose' else 'tasks.model'}:{env_of(model)['MLSERVE_GRPC_PORT']} proto h2" in config
    documents = read("grpc", "kubernetes")
    [port] = [p for p in one(documents, "Service")["spec"]["ports"] if p["port"] == 8081]
    opened = {p["name"]: p["containerPort"] for p in container_of(documents)["ports"]}
    assert str(opened[port["targetPort"]]) == env_of(container_of(documents))["MLSERVE_GRPC_PORT"] and port["appProtocol"] == "kubernetes.io/h2c"
    assert opened[port["targetPort"]] in [p["port"] for p in one(documents, "NetworkPolicy")["spec"]["ingress"][0]["ports"]]
    assert [p["name"] for p in container_of(read("grpc", "kserve"))["ports"]] == ["http", "h2c"]
    for version, engine in CASES:
        assert version == "grpc" or "9000" not in to_text(planned(version, engine)), "nothing of it where nobody asked"


# ---- rules that no schema has: each with a file that breaks it, which the schemas let through

LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


def one(documents, kind):
    return next((d for d in documents if d.get("kind") == kind), None)


def pod_of(documents):
    found = one(documents, "Deployment") or one(documents, "InferenceService")
    return found["spec"]["template"]["spec"] if found["kind"] == "Deployment" else found["spec"]["predictor"]


def container_of(documents):
    return pod_of(documents)["containers"][0]


def amount(text):
    "A quantity of Kubernetes as a number"
    found = re.fullmatch(r"(\d+)(m|Mi|Gi)?", str(text))
    return int(found[1]) * {"m": 0.001, "Mi": 2**20, "Gi": 2**30, None: 1}[found[2]]


def seconds(text):
    return int(re.fullmatch(r"(\d+)s", text)[1])


def env_of(thing):
    env = thing.get("environment") or thing.get("env") or thing.get("Environment")
    return env if isinstance(env, dict) else {e.get("name", e.get("Name")): e.get("value", e.get("Value")) for e in env}


def stops_in(env):
    return float(env["MLSERVE_DRAIN_DELAY"]) + float(env["MLSERVE_GRACE"])


def services(file):
    return file[0]["services"].items()


def undeclared(file):
    named = {m["source"] for _, s in services(file) for m in s.get("volumes", []) if m["type"] == "volume"}
    return named - set(file[0].get("volumes", {}))


RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}}


def ports(c):
    return {p["name"] for p in c["ports"]}


def task(file):
    return file[0]["Resources"]["Task"]["Properties"]


def deep(thing, *path):
    "The value at a path, to be changed"
    for key in path:
        thing = thing[key]
    return thing


def put(*path):
    "A change of one value"
    *where, key, value = path
    return lambda documents: deep(documents, *where).__setitem__(key, value)


def on(find, *path):
    "A change of one value in what is found first"
    *where, key, value = path
    return lambda documents: deep(find(documents), *where).__setitem__(key, value)


def named(kind):
    return lambda documents: one(documents, kind)


def workload(documents):
    return one(documents, "Deployment")


K, D = ("kubernetes", "kserve"), ("compose", "swarm")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# engines · what holds · whether it does · a change after which it does not
RULES = [
    (K, "a request is no larger than its limit", lambda x: all(amount(v) <= amount(container_of(x)["resources"]["limits"][k]) for k, v in container_of(x)["resources"]["requests"].items()), on(container_of, "resources", "requests", "memory", "999Gi")),
    (K, "a startup probe is done after one success", lambda x: all(container_of(x)[p].get("successThreshold", 1) == 1 for p in ("startupProbe", "livenessProbe")), on(container_of, "startupProbe", "successThreshold", 3)),
    (K, "a probe asks a port that exists", lambda x: all(container_of(x)[p]["httpGet"]["port"] in ports(container_of(x)) for p in PROBES), on(container_of, "readinessProbe", "httpGet", "port", "https")),
    (K, "the startup probe waits as long as the readiness of a server may take", lambda x: container_of(x)["startupProbe"]["periodSeconds"] * container_of(x)["startupProbe"]["failureThreshold"] >= 20, on(container_of, "startupProbe", "failureThreshold", 1)),
    (K, "what is mounted is a volume of the pod", lambda x: {m["name"] for m in container_of(x)["volumeMounts"]} <= {v["name"] for v in pod_of(x)["volumes"]}, on(container_of, "volumeMounts", 0, "name", "temp")),
    (K, "nothing is killed while it finishes", lambda x: pod_of(x)["terminationGracePeriodSeconds"] > stops_in(env_of(container_of(x))), on(pod_of, "terminationGracePeriodSeconds", 10)),
    (K, "a container is under the restricted profile", lambda x: RESTRICTED.items() <= container_of(x)["securityContext"].items() and pod_of(x)["securityContext"]["runAsUser"] > 10000, on(container_of, "securityContext", "runAsNonRoot", False)),
    (K, "the autoscaler counts what exists, between a least and a most", lambda x: (h := one(x, "HorizontalPodAutoscaler")) is None or h["spec"]["minReplicas"] < h["spec"]["maxReplicas"]
     and h["spec"]["scaleTargetRef"]["name"] == (workload(x) or {"metadata": {"name": one(x, "InferenceService")["metadata"]["name"] + "-predictor"}})["metadata"]["name"], on(named("HorizontalPodAutoscaler"), "spec", "scaleTargetRef", "name", "digit")),
    (K, "names are host names, and values of labels fit", lambda x: all(LABEL.fullmatch(o["metadata"]["name"]) and all(re.fullmatch(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", v) for v in o["metadata"].get("labels", {}).values()) for o in x), on(named("ServiceAccount"), "metadata", "labels", "x", "sha256:" + "a" * 64)),
    (K, "all is in one namespace, which is there", lambda x: {o["metadata"]["namespace"] for o in x[1:]} == {one(x, "Namespace")["metadata"]["name"]}, on(named("ServiceAccount"), "metadata", "namespace", "default")),
    (K, "the account of the pod exists", lambda x: pod_of(x)["serviceAccountName"] == one(x, "ServiceAccount")["metadata"]["name"] and pod_of(x)["automountServiceAccountToken"] is False, on(pod_of, "serviceAccountName", "other")),
    (("kubernetes",), "all selectors find the pods", lambda x: all(s.items() <= workload(x)["spec"]["template"]["metadata"]["labels"].items() for s in (
        workload(x)["spec"]["selector"]["matchLabels"], one(x, "Service")["spec"]["selector"], one(x, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"], one(x, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])),
     on(named("Service"), "spec", "selector", "app.kubernetes.io/name", "digit")),
    (("kubernetes",), "a selector holds no version", lambda x: set(workload(x)["spec"]["selector"]["matchLabels"]) == {f"app.kubernetes.io/{x}" for x in ("name", "managed-by", "instance", "component")}, on(workload, "spec", "selector", "matchLabels", "app.kubernetes.io/version", "3")),
    (("kubernetes",), "the service's port is the container's", lambda x: all(p["targetPort"] in ports(container_of(x)) for p in one(x, "Service")["spec"]["ports"]), on(named("Service"), "spec", "ports", 0, "targetPort", "https")),
    (("kubernetes",), "either a number or an autoscaler", lambda x: ("replicas" in workload(x)["spec"]) != bool(one(x, "HorizontalPodAutoscaler")), lambda x: workload(x)["spec"].update(replicas=1) if one(x, "HorizontalPodAutoscaler") else workload(x)["spec"].pop("replicas")),
    (("kubernetes",), "an update takes nothing away, and can go on", lambda x: (r := workload(x)["spec"]["strategy"]["rollingUpdate"])["maxUnavailable"] == 0 and r["maxSurge"] > 0, on(workload, "spec", "strategy", "rollingUpdate", "maxSurge", 0)),
    (("kubernetes",), "a deadline of progress is longer than a start", lambda x: workload(x)["spec"]["progressDeadlineSeconds"] > 2 * container_of(x)["startupProbe"]["failureThreshold"], on(workload, "spec", "progressDeadlineSeconds", 5)),
    (("kubernetes",), "a node can be emptied", lambda x: one(x, "PodDisruptionBudget")["spec"].get("maxUnavailable") == 1 and "minAvailable" not in one(x, "PodDisruptionBudget")["spec"], on(named("PodDisruptionBudget"), "spec", "maxUnavailable", 0)),
    (("kserve",), "KServe finds its container, and its protocol", lambda x: all(c["name"] == "kserve-container" and env_of(c)["PROTOCOL"] == "v2" for c in (container_of(x), one(x, "ServingRuntime")["spec"]["containers"][0])), on(container_of, "name", "model")),
    (("kserve",), "who counts is said, and its bounds are in order", lambda x: one(x, "InferenceService")["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external" and pod_of(x)["minReplicas"] <= pod_of(x)["maxReplicas"], on(pod_of, "maxReplicas", 0)),
    (D, "what is mounted is declared", lambda x: not undeclared(x), lambda x: x[0]["services"]["model"].setdefault("volumes", []).append({"type": "volume", "source": "lost", "target": "/lost"})),
    (D, "nothing is killed while it finishes", lambda x: seconds(x[0]["services"]["model"]["stop_grace_period"]) > stops_in(env_of(x[0]["services"]["model"])), put(0, "services", "model", "stop_grace_period", "10s")),
    (D, "nothing is replaced by the shell, but what starts the proxy", lambda x: not re.search(r"(?<!\$)\$(?!\$)", yaml.safe_dump_all(x).replace("$$HAPROXY_CONFIG", "")), put(0, "services", "model", "environment", "MLSERVE_IMAGE", "${IMAGE}")),
    (D, "every container has limits, and nothing to gain", lambda x: all(s["read_only"] and s["cap_drop"] == ["ALL"] and s["user"] == "10001:10001" and {"cpus", "memory", "pids"} <= set(s["deploy"]["resources"]["limits"]) for _, s in services(x)), put(0, "services", "model", "read_only", False)),
    (D, "the proxy waits longer than a call of the model may take, and stops after its last answer", lambda x: int(re.search(r"timeout server (\d+)s", x[0]["services"]["proxy"]["environment"]["HAPROXY_CONFIG"])[1]) > float(env_of(x[0]["services"]["model"]).get("MLSERVE_HANG_SECONDS", 60))
     and x[0]["services"]["proxy"]["stop_signal"] == "SIGUSR1", put(0, "services", "proxy", "stop_signal", "SIGTERM")),
    (("compose",), "a GPU is asked for in the form that fails", lambda x: not any("gpus" in s for _, s in services(x)) and ("shm_size" in x[0]["services"]["model"]) == ("reservations" in x[0]["services"]["model"]["deploy"]["resources"]), put(0, "services", "model", "gpus", "all")),
    (("compose",), "no swap", lambda x: all(s["memswap_limit"] == s["deploy"]["resources"]["limits"]["memory"] for _, s in services(x)), put(0, "services", "model", "memswap_limit", "-1")),
    (("compose",), "ports have an address", lambda x: all("host_ip" in p for _, s in services(x) for p in s["ports"]), put(0, "services", "proxy", "ports", [{"target": 8080, "published": "8080"}])),
    (("compose",), "no privileges to gain", lambda x: all(s["security_opt"] == ["no-new-privileges:true"] for _, s in services(x)), put(0, "services", "model", "security_opt", [])),
    (("swarm",), "nothing that a stack ignores", lambda x: not {k for _, s in services(x) for k in s} & {"security_opt", "tmpfs", "restart", "container_name", "depends_on", "devices", "build", "links", "network_mode", "memswap_limit", "userns_mode"}, put(0, "services", "model", "tmpfs", ["/tmp"])),
    (("swarm",), "networks are declared, names resolve to containers", lambda x: all(set(s["networks"]) <= set(x[0]["networks"]) and s["deploy"]["endpoint_mode"] == "dnsrr" for _, s in services(x)), put(0, "services", "model", "networks", ["outside"])),
    (("swarm",), "an update starts first, goes back by itself, and is watched for longer than three bad answers", lambda x: (u := x[0]["services"]["model"]["deploy"]["update_config"])["order"] == "start-first" and u["failure_action"] == "rollback" and seconds(u["monitor"]) > 15, put(0, "services", "model", "deploy", "update_config", "monitor", "5s")),
    (("swarm",), "a port that is not behind a virtual address is published by the host", lambda x: all(p["mode"] == "host" for p in x[0]["services"]["proxy"]["ports"]), put(0, "services", "proxy", "ports", [{"target": 8080, "published": 8080, "mode": "ingress"}])),
    (("ecs",), "a container fits into its task", lambda x: "Memory" not in task(x) or int(task(x)["Memory"]) >= task(x)["ContainerDefinitions"][0]["Memory"] and int(task(x)["Cpu"]) >= task(x)["ContainerDefinitions"][0]["Cpu"], lambda x: task(x).update(Cpu="256", Memory="512", RequiresCompatibilities=["FARGATE"])),
    (("ecs",), "the load balancer's container exists", lambda x: {b["ContainerName"] for b in x[0]["Resources"]["Service"]["Properties"]["LoadBalancers"]} <= {c["Name"] for c in task(x)["ContainerDefinitions"]}, put(0, "Resources", "Service", "Properties", "LoadBalancers", 0, "ContainerName", "web")),
    (("ecs",), "nothing is killed while it finishes", lambda x: task(x)["ContainerDefinitions"][0]["StopTimeout"] > stops_in(env_of(task(x)["ContainerDefinitions"][0])), on(task, "ContainerDefinitions", 0, "StopTimeout", 10)),
    (("ecs",), "what is kept in memory fits into it", lambda x: sum(t["Size"] for t in task(x)["ContainerDefinitions"][0]["LinuxParameters"]["Tmpfs"]) < task(x)["ContainerDefinitions"][0]["Memory"], on(task, "ContainerDefinitions", 0, "LinuxParameters", "Tmpfs", 0, "Size", 10**6)),
    (("ecs",), "a GPU is on a machine that has one", lambda x: ("ResourceRequirements" in task(x)["ContainerDefinitions"][0]) == (task(x)["RequiresCompatibilities"] == ["EC2"]) == (x[0]["Resources"]["Service"]["Properties"]["LaunchType"] == "EC2"), lambda x: task(x).update(RequiresCompatibilities=["FARGATE"] if "ResourceRequirements" in task(x)["ContainerDefinitions"][0] else ["EC2"])),
    (("ecs",), "an update takes nothing away", lambda x: x[0]["Resources"]["Service"]["Properties"]["DeploymentConfiguration"]["MinimumHealthyPercent"] == 100 and x[0]["Resources"]["Service"]["Properties"]["DeploymentConfiguration"]["DeploymentCircuitBreaker"]["Rollback"], put(0, "Resources", "Service", "Properties", "DeploymentConfiguration", "MinimumHealthyPercent", 0)),
    (("sagemaker",), "the alarm looks at the endpoint and the variant that exist", lambda x: {d["Value"] for d in x[0]["Resources"]["Failing"]["Properties"]["Dimensions"]} == {x[0]["Resources"]["Endpoint"]["Properties"]["EndpointName"], x[0]["Resources"]["Config"]["Properties"]["ProductionVariants"][0]["VariantName"]},
     put(0, "Resources", "Failing", "Properties", "Dimensions", 0, "Value", "other")),
    (("sagemaker",), "a canary is half of the machines at most", lambda x: (r := x[0]["Resources"]["Endpoint"]["Properties"]["DeploymentConfig"]["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"])["Type"] == "ALL_AT_ONCE"
     or 2 * r["CanarySize"]["Value"] <= x[0]["Resources"]["Config"]["Properties"]["ProductionVariants"][0]["InitialInstanceCount"], put(0, "Resources", "Endpoint", "Properties", "DeploymentConfig", "BlueGreenUpdatePolicy", "TrafficRoutingConfiguration", {"Type": "CANARY", "WaitIntervalInSeconds": 300, "CanarySize": {"Type": "INSTANCE_COUNT", "Value": 50}})),
    (("sagemaker",), "a model that is not isolated says why", lambda x: (m := x[0]["Resources"]["Model"])["Properties"]["EnableNetworkIsolation"] != ("Metadata" in m), lambda x: (m := x[0]["Resources"]["Model"]["Properties"]).update(EnableNetworkIsolation=not m["EnableNetworkIsolation"])),
]
NAMES = [f"{'-'.join(engines)}: {what}" for engines, what, *_ in RULES]


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_rule_holds_for_every_file_and_finds_the_one_that_breaks_it(rule):
    engines, _, holds, spoil = rule
    for version, engine in [c for c in CASES if c[1] in engines]:
        assert holds(read(version, engine)), f"{engine}, {version}"
        documents = read(version, engine)
        try:
            spoil(documents)
        except TypeError:  # a version without an autoscaler has none to spoil
            assert version == "gpu"
            continue
        assert not holds(documents), f"{engine}, {version}"


def spoilt(engine):
    "What breaks each rule of an engine"
    for engines, what, _, spoil in RULES:
        if engine in engines:
            documents = read("digits", engine)
            spoil(documents)
            yield what, documents


def test_most_of_the_rules_are_what_schemas_let_through(kubernetes_validate, tmp_path):
    "Whoever deletes one because a schema surely has it is told that it has not"
    passed = [(what, [e.message for e in jsonschema.Draft202012Validator(SCHEMAS["compose"]).iter_errors(d)]) for what, [d] in spoilt("compose")]
    passed += [(what, [e.message for e in jsonschema.Draft4Validator(SCHEMAS["stack"]).iter_errors(d)]) for what, [d] in spoilt("swarm")]
    files = {}
    for i, (what, documents) in enumerate(spoilt("kubernetes")):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump_all([d for d in documents if d not in read("digits", "kubernetes")]))
        files[what] = tmp_path / f"{i}.yaml"
    wrong = kubernetes_validate(*files.values())
    passed += [(what, wrong.get(file.name, [])) for what, file in files.items()]
    assert [entry for entry in passed if entry[1]] == [], "no rule of ours is needed for these"


# ---- the command


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    "The environment of a store with one version in production, and with one that was not checked"
    import os

    import torch

    from mlserve.package import save_package
    from mlserve.release.record import log_package, mark, promote, record
    from mlserve.release.record.mlflow_store import client
    from mlserve.release.spec import ReleaseSpec
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        monkey.setenv("MLSERVE_STATE", str(folder))
        monkey.delenv("MLFLOW_RUN_ID", raising=False)
        package = save_package(torch.nn.Linear(4, 2), folder / "p", "sums", {"x": torch.ones(8, 4)}, ["y"])
        logged = log_package(package.path)
        spec = ReleaseSpec(name="sums", notebook="sums.ipynb", deploy={"replicas": 2, "memory": "1g"})
        client().set_tag(logged.run_id, "mlserve.spec", spec.model_dump_json())
        first = record("sums", logged, "registry.test/sums@sha256:" + "1" * 64)
        mark(first, "cpu", FINDING)
        promote("sums", first.version)
        record("sums", logged, "registry.test/sums@sha256:" + "2" * 64)
        return {name: os.environ[name] for name in ("MLFLOW_TRACKING_URI", "MLSERVE_STATE")}


def test_render_prints_the_version_in_production_and_nothing_else(recorded, monkeypatch, capsys):
    "Its image is in no registry; that the registry is asked is a test of what is released"
    for name, value in {**recorded, "MLSERVE_PROXY_IMAGE": PROXY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendering, "planned", partial(rendering.planned, confirm=lambda pair: None))
    assert run_command(["render", "kubernetes", "sums"]) == 0
    out, err = capsys.readouterr()
    found = list(yaml.safe_load_all(out))
    assert not err and container_of(found)["image"].endswith("1" * 64) and container_of(found)["resources"]["limits"]["memory"] == "1024Mi"
    assert run_command(["render", "compose", "sums", "--version", "1"]) == 0
    assert capsys.readouterr().out.startswith("# sums version 1, generated by mlserve render compose")


@pytest.mark.parametrize("code, sentence, words", [
    (3, "has not passed on cpu", ("kubernetes", "sums", "--version", "2")), (2, "No version '9' is recorded", ("kubernetes", "sums", "--version", "9")),
    (2, "No model 'nothing'", ("ecs", "nothing")), (2, "allowed: compose, swarm, kubernetes", ("nomad", "sums")), (2, "no image of a proxy is known", ("compose", "sums"))])
def test_what_cannot_be_rendered_is_told(recorded, code, sentence, words, monkeypatch, capsys):
    for name, value in recorded.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLSERVE_PROXY_IMAGE", raising=False)
    assert run_command(["render", *words]) == code
    out, err = capsys.readouterr()
    assert not out and sentence in last_json(err)["error"] and last_json(err)["code"] == code
