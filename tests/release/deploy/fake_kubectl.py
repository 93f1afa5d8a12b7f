"""A kubectl with a small cluster behind it, in one file: objects as they were applied, a controller of Deployments that takes a step at each call, a node.

Only what `mlserve deploy kubernetes` asks is here. That it answers as a real one does is shown by the same tests on a real control plane, in `make kubernetes`."""
import copy
import fcntl
import hashlib
import json
import os
import time
from pathlib import Path

import yaml
from kubelet import page_of, status_of

SENT = "kubectl.kubernetes.io/last-applied-configuration"
KINDS = {"deployments": "Deployment", "services": "Service", "serviceaccounts": "ServiceAccount", "networkpolicies": "NetworkPolicy", "namespaces": "Namespace", "pods": "Pod",
         "poddisruptionbudgets": "PodDisruptionBudget", "horizontalpodautoscalers": "HorizontalPodAutoscaler", "events": "Event", "namespace": "Namespace", "deployment": "Deployment"}


class Failed(Exception):
    "What is printed on stderr, with exit code 1"


def fail(text):
    raise Failed(text)


def key(item):
    return f"{item['metadata'].get('namespace', '')}/{item['kind']}/{item['metadata']['name']}"


def digest(template):
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]


def is_ready(pod):
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))


def control(state, work):
    "One step of a rollout with maxSurge 1 and maxUnavailable 0"
    objects, spec, name = state["objects"], work["spec"], work["metadata"]["name"]
    wanted, now = spec.get("replicas", 1), digest(spec["template"])
    pods = [o for o in objects.values() if o["kind"] == "Pod" and o["metadata"]["ownerReferences"][0]["name"] == name and o["metadata"]["namespace"] == work["metadata"]["namespace"]]
    new, old = [p for p in pods if p["metadata"]["labels"]["pod-template-hash"] == now], [p for p in pods if p["metadata"]["labels"]["pod-template-hash"] != now]
    sick, ready = [p for p in old if not is_ready(p)], [p for p in pods if is_ready(p)]
    if sick:
        objects.pop(key(sick[0]))
    elif len(new) > wanted:
        objects.pop(key(new[-1]))
    elif old and len(ready) > wanted:
        objects.pop(key(old[-1]))
    elif len(new) < wanted and len(pods) < wanted + 1:
        state["count"] += 1
        made = {"apiVersion": "v1", "kind": "Pod", "metadata": copy.deepcopy(spec["template"]["metadata"]), "spec": copy.deepcopy(spec["template"]["spec"]), "status": {}}
        made["metadata"] |= {"name": f"{name}-{now}-{state['count']}", "namespace": work["metadata"]["namespace"], "ownerReferences": [{"name": name}],
                             "creationTimestamp": f"2026-01-01T00:00:00.{state['count']:06d}Z", "uid": str(state["count"])}
        made["metadata"]["labels"]["pod-template-hash"] = now
        objects[key(made)] = made
    pods = [o for o in objects.values() if o["kind"] == "Pod" and o["metadata"]["ownerReferences"][0]["name"] == name and o["metadata"]["namespace"] == work["metadata"]["namespace"]]
    work["status"] = {"observedGeneration": work["metadata"]["generation"], "replicas": len(pods), "availableReplicas": sum(map(is_ready, pods)),
                      "updatedReplicas": sum(p["metadata"]["labels"]["pod-template-hash"] == now for p in pods)}


def reconcile(state):
    objects = state["objects"]
    for pod in [o for o in objects.values() if o["kind"] == "Pod"]:
        if not any(o["kind"] == "Deployment" and o["metadata"]["name"] == pod["metadata"]["ownerReferences"][0]["name"] for o in objects.values()):
            objects.pop(key(pod))
        elif not pod["status"]:
            pod["status"] = status_of(pod, state["images"].get(pod["spec"]["containers"][0]["image"].split("@")[1], "good"))
    for work in [o for o in objects.values() if o["kind"] == "Deployment"]:
        control(state, work)


def apply(state, document, rehearse):
    objects, name = state["objects"], key(document)
    before, made = objects.get(name), copy.deepcopy(document)
    if document["metadata"].get("namespace") and f"/Namespace/{document['metadata']['namespace']}" not in objects:
        fail(f'Error from server (NotFound): namespaces "{document["metadata"]["namespace"]}" not found')
    if document["kind"] == "Deployment" and not before and "replicas" not in made["spec"]:
        made["spec"]["replicas"] = 1
    made["metadata"].setdefault("annotations", {})[SENT] = json.dumps(document)
    same = before and before.get("spec") == made.get("spec")
    made["metadata"] |= {"generation": before["metadata"]["generation"] + (not same) if before else 1}
    if before and "status" in before:
        made["status"] = before["status"]
    if not rehearse:
        objects[name] = made
    return f"{document['kind'].lower()}/{document['metadata']['name']} {'unchanged' if same else 'configured' if before else 'created'}"


def option(words, *names):
    for i, word in enumerate(words):
        for name in names:
            if word == name:
                return words[i + 1]
            if word.startswith(name + "="):
                return word[len(name) + 1:]
    return ""


def get(state, words, namespace, given):
    "What is printed"
    if raw := option(words, "--raw"):
        if raw == "/version":
            return json.dumps({"major": "1", "minor": "20", "gitVersion": "v1.20.2"})
        pod = state["objects"].get(f"{namespace}/Pod/{raw.split('/http:')[1].split(':')[0]}") or fail("Error from server (NotFound): the server could not find the requested resource")
        return page_of(pod, state["images"].get(pod["spec"]["containers"][0]["image"].split("@")[1], "good"))
    everywhere, chosen = "--all-namespaces" in words, dict(pair.split("=") for pair in option(words, "--selector", "-l").split(",") if pair)
    if option(words, "--filename", "-f"):
        keys = [key(d) for d in yaml.safe_load_all(given)]
        items = [state["objects"][k] for k in keys if k in state["objects"]]
    else:
        kinds = [KINDS[k.split(".")[0]] for k in words[1].split(",") if k.split(".")[0] in KINDS]
        items = [o for o in state["objects"].values() if o["kind"] in kinds and (everywhere or o["metadata"].get("namespace", namespace) == namespace)]
        names = [w for w in words[2:] if not w.startswith("-") and w not in ("json", option(words, "--output", "-o"), option(words, "--selector", "-l"), option(words, "--field-selector"))]
        items = [o for o in items if not names or o["metadata"]["name"] in names]
    items = [o for o in items if chosen.items() <= o["metadata"].get("labels", {}).items()]
    if not items and "--ignore-not-found" in words:
        return ""
    alone = not option(words, "--selector", "-l") and len(items) == 1 and not everywhere
    return json.dumps(items[0] if alone else {"kind": "List", "items": items})


def answer(state, rest, namespace, given):
    "What is printed on stdout"
    if rest[0] == "get":
        reconcile(state)
        return get(state, rest, namespace, given)
    if rest[0] == "apply":
        return "\n".join([apply(state, document, "--dry-run=server" in rest) for document in yaml.safe_load_all(given)])
    if rest[0] == "replace":
        item = json.loads(given)
        item["metadata"]["generation"] += 1
        item["metadata"]["annotations"][SENT] = json.dumps(item | {"metadata": item["metadata"] | {"annotations": {k: v for k, v in item["metadata"]["annotations"].items() if k != SENT}}})
        state["objects"][key(item)] = item
    elif rest[0] == "delete":
        kind, name = rest[-1].split("/")
        state["objects"].pop(f"{namespace}/{kind.split('.')[0]}/{name}", None)
    elif rest[0] == "logs":
        return state.get("log", "")
    else:
        fail(f'error: unknown command "{rest[0]}" for "kubectl"')
    return ""


def main(words, given):
    "What is printed on stdout; or Failed"
    flags, rest = {}, []
    words = list(words)
    while words:
        word = words.pop(0)
        if word in ("--context", "--namespace", "-n"):
            flags[word.lstrip("-")[0]] = words.pop(0)
        elif not word.startswith("--request-timeout"):
            rest.append(word)
    if rest[:2] == ["config", "get-contexts"] or rest[:2] == ["config", "current-context"]:
        return "test\n"
    home = Path(os.environ["FAKE_CLUSTER"])
    with open(home / "lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        state = json.loads((home / "state").read_text())
        if state.get("away", 0) > time.time():
            fail("The connection to the server 127.0.0.1:6443 was refused - did you specify the right host or port?")
        try:
            return answer(state, rest, flags.get("n", "default"), given)
        finally:
            (home / "new").write_text(json.dumps(state))
            (home / "new").rename(home / "state")
