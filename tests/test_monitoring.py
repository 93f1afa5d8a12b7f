"""Alert rules, evaluated by Prometheus's own promtool on series that a fault would write, and on those of a healthy server."""
import json
import subprocess

import pytest
from typer.testing import CliRunner

from mlserve.cli import app
from mlserve.monitoring import ALERTS, alert_rules
from mlserve.release.deploy.render.yaml_text import to_yaml

AT = "{job='digits'}"
HEALTHY = {"mlserve_ready" + AT: "1x400", "mlserve_info{job='digits',version='3'}": "1x400", "mlserve_pending" + AT: "1x400", "mlserve_pending_limit" + AT: "64x400",
           "mlserve_container_memory_working_set_bytes" + AT: "5x400", "mlserve_container_memory_limit_bytes" + AT: "10x400",
           "mlserve_requests_total{job='digits',route='/predict',status='200'}": "0+600x400", "mlserve_requests_total{job='digits',route='/v2/health/ready',status='503'}": "0+60x400",
           **{f"mlserve_{n}_total{AT}": "0x400" for n in ("restarts", "failed", "out_of_memory", "shed", "lost_lines", "container_oom_kills", "container_cpu_throttled_periods")}}
ERRORS = "mlserve_requests_total{job='digits',route='/predict',status='500'}"
FAULTS = {"ErrorBudgetBurnsFast": {ERRORS: "0+30x400"}, "ErrorBudgetBurnsSlow": {ERRORS: "0+5x400"}, "NotReady": {"mlserve_ready" + AT: "1x380 0x20"},
          "Gone": {"mlserve_info{job='digits',version='3'}": "1x380 stale"}, "Restarts": {f"mlserve_restarts_total{AT}": "0x390 1+1x10"}, "ModelFails": {f"mlserve_failed_total{AT}": "0+1x400"},
          "OutOfMemory": {f"mlserve_out_of_memory_total{AT}": "0x392 1x8"}, "Killed": {f"mlserve_container_oom_kills_total{AT}": "0x392 1x8"},
          "MemoryFull": {"mlserve_container_memory_working_set_bytes" + AT: "9.5x400"}, "Sheds": {f"mlserve_shed_total{AT}": "0+5x400"}, "QueueFills": {"mlserve_pending" + AT: "60x400"},
          "Throttled": {f"mlserve_container_cpu_throttled_periods_total{AT}": "0+400x400"}, "TwoVersions": {"mlserve_info{job='digits',version='4'}": "1x400"}, "LogLost": {f"mlserve_lost_lines_total{AT}": "0x392 3x8"}}


@pytest.fixture(scope="module")
def fired(promtool, tmp_path_factory):
    "Ask promtool whether an alert fires on series, after 400 minutes"
    folder = tmp_path_factory.mktemp("rules")
    (folder / "rules.yaml").write_text(to_yaml([alert_rules()]))

    def ask(name, series):
        [rule] = [r for r in alert_rules()["groups"][0]["rules"] if r["alert"] == f"Mlserve{name}"]
        test = {"interval": "1m", "input_series": [{"series": s, "values": v} for s, v in series.items()],
                "alert_rule_test": [{"eval_time": "400m", "alertname": rule["alert"], "exp_alerts": []}]}
        (folder / "test.yaml").write_text(to_yaml([{"rule_files": ["rules.yaml"], "tests": [test]}]))
        done = subprocess.run([promtool, "test", "rules", folder / "test.yaml"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or "got:" in done.stdout + done.stderr, done.stdout + done.stderr  # else it could not read the rules
        return done.returncode != 0, done.stdout + done.stderr
    return ask


def test_each_alert_has_a_fault():
    assert set(FAULTS) == {a.name for a in ALERTS} | {"ErrorBudgetBurnsFast", "ErrorBudgetBurnsSlow"}


@pytest.mark.parametrize("name", FAULTS)
def test_an_alert_fires_on_its_fault_and_on_no_healthy_server(fired, name):
    fires, said = fired(name, HEALTHY | FAULTS[name])
    assert fires and "digits" in said, said
    assert not fired(name, HEALTHY)[0]


def test_a_slow_leak_of_errors_wakes_nobody_at_night(fired):
    "Eight in a thousand: a warning, and no page"
    assert not fired("ErrorBudgetBurnsFast", HEALTHY | FAULTS["ErrorBudgetBurnsSlow"])[0]


def test_render_prints_both_files_without_a_model():
    shown = CliRunner().invoke(app, ["render", "alerts"])
    assert shown.exit_code == 0 and shown.stdout.startswith("groups:")
    board = json.loads(CliRunner().invoke(app, ["render", "dashboard"]).stdout)
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"]) > 40
    assert {v["name"] for v in board["templating"]["list"]} == {"datasource", "job"}
