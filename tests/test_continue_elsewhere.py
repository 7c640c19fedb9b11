"A run that has used its budget continues in a clone; a commit and seed give the same bytes when all is recomputed."
import json
import subprocess
from pathlib import Path

import pytest

from ai2text.testing.s3_faults import KEY, SECRET, serve_s3
from workspace import M, Workspace

PARTS = ("train@" + M, "init@" + M, "corpus@demo", "prepare", "shards")


class Clone(Workspace):
    "A clone of a workspace's repository, without DVC's cache."
    def __init__(self, source:Path, root:Path):
        self.root = root
        subprocess.run(["git", "clone", "-q", source, root], check=True, capture_output=True)


def entries(folder:Path, kind:str)->list:
    return [e for line in (folder/"ttq_log.jsonl").read_text().splitlines() if (e := json.loads(line))["kind"] == kind]


def run_of(workspace:Workspace, budget:str)->Path:
    folder, = workspace.root.glob(f".runs/{M}/*/{budget}")
    return folder


def outputs(workspace:Workspace)->dict:
    "The published files of training that contain no times."
    paths = [f"results/{M}/metrics.json", f"models/{M}/model.safetensors", f"models/{M}/config.json"]
    paths += [f"models/runs/{M}/checkpoints/{name}/model.safetensors" for name in ("before-decay", "best")]
    return {path: (workspace.root/path).read_bytes() for path in paths}


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    "An S3 server with an empty bucket, and its credentials in the environment."
    folder = tmp_path_factory.mktemp("store")
    (folder/"bucket").mkdir()
    keys = dict(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_EC2_METADATA_DISABLED="true")
    with serve_s3(folder) as url, pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items(): patch.setenv(name, value)
        yield url


@pytest.fixture(scope="module")
def first(pipeline, far, tmp_path_factory):
    "A workspace that has trained, pushed and committed."
    w = Workspace.copy(pipeline, tmp_path_factory.mktemp("machines")/"first")
    w.run("dvc", "remote", "add", "-d", "there", "s3://bucket/dvc"), w.run("dvc", "remote", "modify", "there", "endpointurl", far)
    w.run("git", "add", "-A"), w.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "60 steps")
    w.run("dvc", "push", *PARTS)
    w.published = outputs(w)
    return w


def test_environment_is_in_log_and_report_but_not_in_the_metrics(first):
    about, metrics, report = first.log()["about"], first.metrics().decode(), first.report(f"train-{M}").read_text("utf-8")
    assert {"revision", "changed", "pins", "python", "torch", "numpy", "dvc", "system", "processor", "memory_gb", "gpu"} <= about.keys()
    for name in ("pins", "numpy", "system"): assert about[name] in report
    for name in ("pins", "torch", "system", "processor"): assert str(about[name]) not in metrics


def test_a_clone_continues_with_a_larger_budget(first, tmp_path):
    second = Clone(first.root, tmp_path/"second")
    second.run("dvc", "pull", *PARTS)
    assert outputs(second) == first.published and not (second.root/".runs").exists()
    for w in (second, first): w.train(max_steps=80)
    assert outputs(second) == outputs(first) != first.published
    parent, longer = run_of(second, "60-steps"), run_of(second, "80-steps")
    first_step = json.loads((parent/"checkpoints/before-decay/checkpoint.json").read_text())["step"]
    assert [e["step"] for e in entries(longer, "resume")] == [0, first_step] and first_step > 0
    resumed_at = entries(longer, "start")[1]["wall"]
    assert min(e["step"] for e in entries(longer, "beat") + entries(longer, "checkpoint") if e["wall"] > resumed_at) >= first_step
    log, saved = second.log(), next(e["seconds"] for e in entries(parent, "checkpoint") if e["step"] == first_step)
    assert log["finished"] and log["totals"]["attempts"] == 2
    assert log["totals"]["down_hours"] > 0 and log["totals"]["elapsed_hours"]*3600 > saved
    assert [h["step"] for h in log["history"]] == [20, 40, 60, 80]
    listed = second.run("ai2text", "runs")
    assert "60-steps" in listed and "80-steps" in listed


@pytest.mark.slow
def test_the_same_commit_gives_the_same_bytes_when_recomputed(first, tmp_path, monkeypatch):
    third = Clone(first.root, tmp_path/"third")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"): monkeypatch.delenv(name)
    assert third.repro(f"train@{M}") == set(PARTS)
    assert outputs(third) == first.published and third.log()["totals"]["attempts"] == 1
    mine, theirs = run_of(third, "60-steps"), run_of(first, "60-steps")
    assert mine.parent.name == theirs.parent.name, "the fingerprint depends on the machine"
    assert entries(mine, "start") != entries(theirs, "start")
