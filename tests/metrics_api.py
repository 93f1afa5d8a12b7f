"""What pods have answered, read from their own metrics, and the custom metrics API that the Prometheus adapter serves, computed from it."""
import contextlib
import http.server
import json
import re
import ssl
import subprocess
import threading
import time
from urllib.parse import unquote, urlsplit

import httpx

GROUP = "custom.metrics.k8s.io/v1beta1"


class Watch:
    "Asks every pod again and again, while it is there; `seen` is a list of (when, requests, seconds spent in them) of each"

    def __init__(self, cluster, every=0.3):
        self.cluster, self.every, self.seen, self.counts, self.going = cluster, every, {}, [], True
        self.thread = threading.Thread(target=self._watch)

    def _watch(self):
        with httpx.Client(trust_env=False, verify=False, timeout=1) as http:
            while self.going:
                pods = self.cluster.http.get("/api/v1/namespaces/mlserve/pods").json()["items"]
                for pod in pods:
                    with contextlib.suppress(httpx.HTTPError, KeyError, TypeError):  # not there yet, or no more
                        text = http.get(f"http://{pod['status']['podIP']}:8080/metrics").text
                        count, spent = (float(re.search(rf"^mlserve_request_seconds_{kind} (\S+)", text, re.M)[1]) for kind in ("count", "sum"))
                        self.seen.setdefault(pod["metadata"]["name"], []).append((time.monotonic(), count, spent))
                self.counts.append((time.monotonic(), sum("deletionTimestamp" not in pod["metadata"] for pod in pods)))
                time.sleep(self.every)

    def answered(self):
        "Requests that all of them have answered"
        return sum(samples[-1][1] for samples in self.seen.values())

    def concurrency(self, pod, window=60):
        "`rate(mlserve_request_seconds_sum[1m])` of a pod"
        samples = [s for s in self.seen.get(pod, []) if s[0] > time.monotonic() - window]
        return (samples[-1][2] - samples[0][2]) / (samples[-1][0] - samples[0][0]) if len(samples) > 1 else None

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.going = False
        self.thread.join()


class Answers(http.server.BaseHTTPRequestHandler):
    watch = None

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == f"/apis/{GROUP}":
            answer = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": GROUP,
                      "resources": [{"name": "pods/mlserve_concurrency", "singularName": "", "namespaced": True, "kind": "MetricValueList", "verbs": ["get"]}]}
        elif path == f"/apis/{GROUP}/namespaces/mlserve/pods/*/mlserve_concurrency":
            told = {pod["metadata"]["name"]: self.watch.concurrency(pod["metadata"]["name"]) for pod in self.watch.cluster.pods()}
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            answer = {"kind": "MetricValueList", "apiVersion": GROUP, "metadata": {}, "items": [
                {"describedObject": {"kind": "Pod", "namespace": "mlserve", "name": name, "apiVersion": "/v1"}, "metricName": "mlserve_concurrency",
                 "timestamp": now, "value": f"{round(1000 * value)}m", "selector": None} for name, value in told.items() if value is not None]}
        else:
            return self.send_error(404)
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def metrics_api(cluster, watch, address):
    "The API, known to the server of a cluster"
    key, certificate = cluster.home / "metrics.key", cluster.home / "metrics.crt"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=metrics", "-days", "2"], check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer((address, 0), type("Bound", (Answers,), {"watch": watch}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    about = {"name": "metrics", "namespace": "default"}
    version, group = reversed(GROUP.split("/"))
    documents = [
        {"apiVersion": "v1", "kind": "Service", "metadata": about, "spec": {"ports": [{"port": 443, "targetPort": server.server_port}]}},
        {"apiVersion": "v1", "kind": "Endpoints", "metadata": about, "subsets": [{"addresses": [{"ip": address}], "ports": [{"port": server.server_port}]}]},
        {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": f"{version}.{group}"}, "spec": {
            "group": group, "version": version, "service": {"name": "metrics", "namespace": "default"}, "insecureSkipTLSVerify": True,
            "groupPriorityMinimum": 100, "versionPriority": 100}}]
    try:
        code, told = cluster.apply(documents)
        assert code == 0, told
        yield
    finally:
        cluster.kubectl("delete", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}))
        server.shutdown()
        server.server_close()
