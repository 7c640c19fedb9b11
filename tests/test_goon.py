"A run that ended at its budget goes on in a clone; and the same commit and seed give the same bytes, from nothing."
import json
import subprocess
from pathlib import Path

import pytest

from ai2text.testing.s3_faults import KEY, SECRET
from workspace import M, Workspace

SHORT = dict(train=dict(max_steps=60, evaluate_every_steps=30))
LONGER = dict(train=dict(max_steps=90))
PARTS = ("train@" + M, "init@" + M, "corpus@demo", "prepare", "shards")


class Clone(Workspace):
    "A clone of a workspace's repository: what git has, and nothing of DVC's cache."
    def __init__(self, source:Path, root:Path):
        self.root = root
        subprocess.run(["git", "clone", "-q", source, root], check=True, capture_output=True)


def entries(folder:Path, kind:str)->list:
    return [e for line in (folder/"ttq_log.jsonl").read_text().splitlines() if (e := json.loads(line))["kind"] == kind]


def run_of(workspace:Workspace, budget:str)->Path:
    folder, = workspace.root.glob(f".runs/{M}/*/{budget}")
    return folder


def outputs(workspace:Workspace)->dict:
    "What training publishes, the clocks apart."
    paths = [f"results/{M}/metrics.json", f"models/{M}/model.safetensors", f"models/{M}/config.json"]
    paths += [f"models/runs/{M}/checkpoints/{name}/model.safetensors" for name in ("before-decay", "best")]
    return {path: (workspace.root/path).read_bytes() for path in paths}


@pytest.fixture
def first(tmp_path, store, monkeypatch):
    "A machine that has trained, pushed and committed."
    for name, value in dict(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_EC2_METADATA_DISABLED="true").items(): monkeypatch.setenv(name, value)
    w = Workspace(tmp_path/"first")
    w.change(SHORT)
    w.run("dvc", "remote", "add", "-d", "there", "s3://bucket/dvc"), w.run("dvc", "remote", "modify", "there", "endpointurl", store.url)
    assert w.repro(f"train@{M}") == set(PARTS)
    w.run("git", "add", "-A"), w.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "sixty steps")
    w.run("dvc", "push")
    return w


def check_environment(workspace):
    "It is in the log and in the report, and none of it in the metrics."
    about, metrics, report = workspace.log()["about"], workspace.metrics().decode(), workspace.report(f"train-{M}").read_text("utf-8")
    assert {"revision", "changed", "pins", "python", "torch", "numpy", "dvc", "system", "processor", "memory_gb", "gpu"} <= about.keys()
    for name in ("pins", "numpy", "system"): assert about[name] in report
    for name in ("revision", "pins", "torch", "system", "processor"): assert str(about[name]) not in metrics


def test_another_machine_goes_on(first, tmp_path, monkeypatch):
    check_environment(first)
    short = outputs(first)

    second = Clone(first.root, tmp_path/"second")
    second.run("dvc", "pull", *PARTS)
    assert outputs(second) == short and not (second.root/".runs").exists()
    for w in (second, first):
        w.change(LONGER)
        assert w.repro(f"train@{M}") == {f"train@{M}"}
    assert outputs(second) == outputs(first) != short
    donor = run_of(second, "60-steps")
    began = json.loads((donor/"checkpoints/before-decay/checkpoint.json").read_text())["step"]
    there = run_of(second, "90-steps")
    assert [e["step"] for e in entries(there, "resume")] == [0, began] and began > 0
    assert min(e["step"] for e in entries(there, "beat") + entries(there, "checkpoint") if e["wall"] > entries(there, "start")[1]["wall"]) >= began
    log, saved = second.log(), next(e["seconds"] for e in entries(donor, "checkpoint") if e["step"] == began)
    assert log["finished"] and log["totals"]["lives"] == 2 and log["totals"]["down_hours"] > 0 and log["totals"]["elapsed_hours"]*3600 > saved
    assert [h["step"] for h in log["history"]] == [30, 60, 90]
    listed = second.run("ai2text", "runs")
    assert "60-steps" in listed and "90-steps" in listed

    third = Clone(first.root, tmp_path/"third")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID"), monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert third.repro(f"train@{M}") == set(PARTS)
    assert outputs(third) == short and third.log()["totals"]["lives"] == 1
    mine, theirs = run_of(third, "60-steps"), donor
    assert mine.parent.name == theirs.parent.name, "a fingerprint that depends on the machine"
    assert entries(mine, "start") != entries(theirs, "start")
