"""`mlserve deploy kubernetes` with a stand-in for kubectl and its cluster, twenty times as fast; `make kubernetes` asks the same of a real control plane."""
import inspect
import json
import subprocess
import time
from types import SimpleNamespace

import fake_kubectl
import mutations
import pytest
from kubernetes_scenarios import (  # noqa: F401 (the tests are run in this world too)
    NAMESPACE, World, asked, deploy, environment, registry,
    test_a_canary_gets_its_share_by_the_number_of_pods_and_goes_back_or_takes_all,
    test_an_autoscaled_target_keeps_its_number_of_pods_from_version_to_version,
    test_L6_R9_versions_replace_each_other_and_each_bad_one_is_taken_back_by_its_cause,
    test_only_what_is_of_the_target_is_touched,
    test_R9_a_bad_version_whose_command_was_killed_is_taken_back_by_the_next_one,
    test_R9_a_command_that_is_killed_leaves_one_serving_and_the_same_command_ends_well,
    test_R9_a_target_that_somebody_else_changes_meanwhile_is_theirs,
    test_status_and_logs_say_what_runs_in_the_cluster,
    test_what_cannot_be_deployed_is_refused_before_anything_is_touched)

from mlserve.release.deploy.kubernetes import kubectl as kubectl_room
from mlserve.release.deploy.kubernetes import watching

FAST = 20


def in_this_process(command, given="", seconds=60, holds=()):
    "In place of a process with kubectl"
    try:
        return subprocess.CompletedProcess(command, 0, fake_kubectl.main(command[1:], given), "")
    except fake_kubectl.Failed as e:
        return subprocess.CompletedProcess(command, 1, "", f"{e}\n")


class Standin(World):
    "A cluster in a file"

    def __init__(self, home):
        super().__init__(lambda image, kind: self.edit(lambda state: state["images"].update({image: kind})))
        self.home = home / "cluster"
        self.home.mkdir()
        (self.home / "state").write_text(json.dumps({"objects": {}, "images": {}, "count": 0}))

    def edit(self, change):
        state = json.loads((self.home / "state").read_text())
        change(state)
        (self.home / "state").write_text(json.dumps(state))


@pytest.fixture(scope="module")
def world(double, tmp_path_factory):
    "The stand-in, and versions in a record"
    home = tmp_path_factory.mktemp("deploy")
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() * FAST, sleep=lambda seconds: time.sleep(seconds / FAST))
    with environment(home, FAKE_CLUSTER=home / "cluster") as monkey, registry() as image_of:
        monkey.setattr(watching, "time", clock)
        monkey.setattr(kubectl_room, "run_kubectl", in_this_process)
        monkey.setattr(kubectl_room.shutil, "which", lambda name: name)
        world = Standin(home)
        world.record(image_of, double)
        yield world


ALL, KILLED, THEIRS = (test_L6_R9_versions_replace_each_other_and_each_bad_one_is_taken_back_by_its_cause, test_R9_a_bad_version_whose_command_was_killed_is_taken_back_by_the_next_one,
                       test_R9_a_target_that_somebody_else_changes_meanwhile_is_theirs)
CONTROLS = [  # plant, scenario, its parameters, words of the line that failed
    ("no_new_pod_is_asked", KILLED, {"bad": "other", "code": 5}, "assert got == code"),
    ("a_bad_version_stays_applied", KILLED, {"bad": "crashes", "code": 5}, 'world.clean(versions["one"])'),
    ("what_was_applied_last_is_the_way_back", KILLED, {"bad": "crashes", "code": 5}, "keeps serving"),
    ("whoever_has_the_name_is_taken_over", test_what_cannot_be_deployed_is_refused_before_anything_is_touched, {}, "that is of somebody else"),
    ("a_namespace_that_is_there_is_made_ours", test_only_what_is_of_the_target_is_touched, {}, "left as it was"),
    ("an_autoscaled_file_names_no_number", test_an_autoscaled_target_keeps_its_number_of_pods_from_version_to_version, {}, 'world.clean(versions["three"], 3)'),
    ("what_a_server_added_is_sent_back", test_an_autoscaled_target_keeps_its_number_of_pods_from_version_to_version, {}, '== {versions["three"]}'),
    ("whoever_applied_last_has_the_target", THEIRS, {}, "assert code == 4"),
    ("old_pods_that_end_are_not_waited_for", ALL, {}, "world.clean(")]


@pytest.mark.parametrize("plant, scenario, more, words", CONTROLS, ids=[row[0] for row in CONTROLS])
def test_R9_control_with_its_bug_planted_the_scenario_fails(world, monkeypatch, plant, scenario, more, words):
    mutations.sow(plant, monkeypatch.setattr)
    if "monkeypatch" in inspect.signature(scenario).parameters:
        more = {**more, "monkeypatch": monkeypatch}
    with pytest.raises(AssertionError) as e:
        scenario(world, **more)
    failed = "\n".join(str(entry.statement) for entry in e.traceback)
    assert words in failed, failed
