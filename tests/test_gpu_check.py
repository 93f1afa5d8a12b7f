"""The check that runs on a GPU, rehearsed without one: every section reports, whatever becomes of the others."""
import contextlib
import importlib.metadata
import json
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from commands import ROOT, run

sys.path.insert(0, str(ROOT / "bench"))
import gpu_check  # noqa: E402

COMMAND = [sys.executable, "-W", "ignore", ROOT / "bench/gpu_check.py"]


@pytest.mark.skipif(not gpu_check.gpu_missing(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_ends_with_nine(tmp_path):
    done = run(*COMMAND, "--out", tmp_path / "out")
    assert done.returncode == 9 and "--cpu" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sections", [["machine", "refusals", "graphs"], pytest.param(list(gpu_check.SECTIONS), marks=pytest.mark.soak)], ids=["three", "whole"])
def test_every_section_is_rehearsed_on_the_cpu(tmp_path, sections):
    done = run(*COMMAND, "--out", tmp_path, "--cpu", "--only", ",".join(sections), timeout=1400)
    results = json.loads((tmp_path / "results.json").read_text())
    states = {name: s["state"] for name, s in results["sections"].items()}
    assert done.returncode == 0 and states == dict.fromkeys(sections, "done"), (states, done.stderr, (tmp_path / "log.txt").read_text()[-3000:])
    assert all(s["tables"] for s in results["sections"].values())
    verdicts = {t["target"]: t["verdict"] for t in results["judged"]}
    assert len(verdicts) == len(gpu_check.TARGETS) and set(verdicts.values()) <= {"rehearsed", "not run"}
    if len(sections) == len(gpu_check.SECTIONS):
        assert [w for w, v in verdicts.items() if v == "not run"] in ([], ["requests/s ÷ LitServe's, same model, same run"])
    assert results["sections"]["refusals"]["targets"]["refused"] == 1
    assert len(list(tmp_path.iterdir())) <= 8 and (tmp_path / "results.md").read_text().count("\n## ") == len(states) + 1


def test_a_section_is_ended_at_its_limit_with_all_it_started_and_leaves_what_it_had(tmp_path):
    (tmp_path / "machine.json").write_text('{"notes": ["before"]}')
    with open(tmp_path / "log.txt", "w") as log:
        found = gpu_check.run_section("machine", 0.05, True, tmp_path, log)
    assert found["state"].startswith("killed") and found["notes"] == ["before"] and found["seconds"] < 5


def test_a_section_that_raises_is_reported_with_its_error(tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        found = gpu_check.run_section("absent", 30, True, tmp_path, log)
    assert found["state"].startswith("failed") and "No module named 'gpu.absent'" in found["error"]


def test_what_is_carried_to_a_machine_with_torch_alone_is_whole():
    "A wheel that needs another one brings it: there is no index where it is unpacked"
    listed = re.search(r"^GPU_WHEELS := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)[1].replace("\\", " ").split()
    carried, needed = {canonicalize_name(name.partition("==")[0]) for name in listed}, {}
    for name in carried:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = [Requirement(line) for line in importlib.metadata.requires(name) or []]
            env = {"extra": "", "python_version": "3.12", "python_full_version": "3.12.3"}
            needed |= {canonicalize_name(r.name): name for r in found if not r.marker or r.marker.evaluate(env)}
    assert not {n: by for n, by in needed.items() if n not in carried}


def test_a_target_is_met_missed_or_not_run_and_never_met_by_a_rehearsal():
    values = {"first_request": 1.2, "saturation": 0.89}
    results = {"rehearsal": False, "sections": {"a": {"targets": values}, "b": {}}}
    verdicts = dict(zip((t[0] for t in gpu_check.TARGETS), (t["verdict"] for t in gpu_check.judged(results)), strict=True))
    assert (verdicts["first_request"], verdicts["saturation"], verdicts["half"]) == ("met", "missed", "not run")
    assert {t["verdict"] for t in gpu_check.judged(results | {"rehearsal": True})} == {"rehearsed", "not run"}
