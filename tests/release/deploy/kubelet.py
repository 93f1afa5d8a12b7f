"""What a node tells of a pod, by what kind its image is: the words of a kubelet, for a control plane without one and for the stand-in."""
import time

WAITS = {"lost": ("ErrImagePull", "failed to resolve reference: not found"), "barred": ("ImagePullBackOff", "Back-off pulling image"),
         "unsecret": ("CreateContainerConfigError", 'secret "store" not found')}
ENDS = {"crashes": (5, "Error"), "oom": (137, "OOMKilled"), "dies": (70, "Error")}
READY = ("good", "other")


def who(pod):
    "Version, image and package that the server in a pod would tell"
    env = {e["name"]: e["value"] for e in pod["spec"]["containers"][0]["env"]}
    return env["MLSERVE_MODEL_VERSION"], env["MLSERVE_IMAGE"], env["MLSERVE_PACKAGE_DIGEST"]


def page_of(pod, kind):
    "The page of metrics of that server"
    version, image, package = who(pod)
    return f'mlserve_info{{version="{"99" if kind == "other" else version}",image="{image}",package="{package}"}} 1.0\n'


def status_of(pod, kind):
    "The status of a pod that a node has had for a moment"
    now, box = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), {"name": "model", "image": who(pod)[1], "imageID": "", "ready": kind in READY, "restartCount": 0}
    if kind == "unplaced":
        return {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."}]}
    if kind in WAITS:
        box["state"] = {"waiting": dict(zip(("reason", "message"), WAITS[kind], strict=True))}
    elif kind in ENDS:
        code, reason = ENDS[kind]
        box |= {"restartCount": 1, "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": {"exitCode": code, "reason": reason, "startedAt": now, "finishedAt": now}}}
    else:
        box |= {"state": {"running": {"startedAt": now}}, "started": True}
    ready = [{"type": "Ready", "status": "True", "lastTransitionTime": now}] if kind in READY else []
    return {"phase": "Running", "startTime": now, "containerStatuses": [box], "conditions": ready}
