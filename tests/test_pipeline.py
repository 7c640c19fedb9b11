"The whole pipeline, small: from nothing, killed, changed, changed back."
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from workspace import ROOT, STAGES, M, Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    "A workspace in which the pipeline ran once."
    w = Workspace(tmp_path_factory.mktemp("pipeline"))
    assert w.repro() == set(STAGES)
    return w


def test_second_run_does_nothing(workspace): assert workspace.repro() == set()


def test_results_answer(workspace):
    log, metrics = workspace.log(), json.loads(workspace.metrics())
    assert log["finished"] and len(log["history"]) == 4 and metrics["steps"] == 240
    assert "val_wer" in workspace.run("dvc", "metrics", "show") and "wer" in workspace.run("dvc", "metrics", "show")
    assert "WER on test" in workspace.run("ai2text", "summary")
    assert f"recommended: {M}" in workspace.run("ai2text", "compare")
    assert (workspace.root/"models/export/SHA256SUMS").exists()
    assert workspace.run("dvc", "plots", "show", f"results/{M}/learning_curve.csv")
    workspace.run("dvc", "plots", "show", f"results/{M}/live")
    assert "val_wer.tsv" in (workspace.root/"dvc_plots/index.html").read_text("utf-8")
    assert {"wer_60", "wer_40", "wer_30", "memory_bytes"} == json.loads((workspace.root/f"results/{M}/ttq.json").read_text()).keys()
    workspace.run("git", "add", "-A"), workspace.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one")


def test_lost_report_is_drawn_again_without_training(workspace):
    before, runs = workspace.report(f"train-{M}").read_bytes(), workspace.runs()
    stamp = Path(runs[0], "result.json").stat().st_mtime_ns
    workspace.report(f"train-{M}").unlink()
    assert workspace.repro() == {f"train@{M}"}
    assert workspace.report(f"train-{M}").read_bytes() == before
    workspace.report(f"train-{M}").write_text("scribbled over")
    assert workspace.repro() == {f"train@{M}"}
    assert workspace.report(f"train-{M}").read_bytes() == before
    assert workspace.runs() == runs and Path(runs[0], "result.json").stat().st_mtime_ns == stamp


def test_changed_back_returns_without_training(workspace):
    before, runs = workspace.metrics(), workspace.runs()
    workspace.change(dict(train=dict(lr=1e-3)))
    assert f"train@{M}" in workspace.repro(f"evaluate@{M}")
    assert workspace.metrics() != before and len(workspace.runs()) == len(runs) + 1
    assert "lr" in workspace.run("dvc", "params", "diff") and "train_loss" in workspace.run("dvc", "metrics", "diff")
    workspace.change(dict(train=dict(lr=YAML().load(ROOT/"params.yaml")["train"]["lr"])))
    workspace.repro(f"evaluate@{M}")
    assert workspace.metrics() == before and len(workspace.runs()) == len(runs) + 1


@pytest.mark.parametrize("what", ["group", "dvc", "dvc without SHELL"])
def test_killed_training_goes_on(workspace, what):
    "One trainer; it resumes; the log counts what was lost; the result is that of a run that was never killed."
    workspace.change(dict(train=dict(seed=dict(zip(["group", "dvc", "dvc without SHELL"], (11, 12, 13)))[what])))
    known = workspace.folders()
    alive = workspace.start(**(dict(SHELL=None) if what == "dvc without SHELL" else {}))
    killed, saved = workspace.wait_for_checkpoint(known)
    if what == "group": os.killpg(alive.pid, signal.SIGKILL)
    else: os.kill(alive.pid, signal.SIGKILL)
    alive.wait()
    assert not (killed/"result.json").exists(), "training was over before it could be killed"
    workspace.repro(f"evaluate@{M}")
    log = workspace.log()
    entries = [json.loads(line) for line in (killed/"ttq_log.jsonl").read_text().splitlines()]
    resumed = [e["step"] for e in entries if e["kind"] == "resume"]
    assert log["finished"] and log["totals"]["lives"] == 2 and len(resumed) == 2 and resumed[1] >= saved > 0
    assert log["totals"]["down_hours"] > 0 and log["totals"]["elapsed_hours"] > 0
    assert [h["step"] for h in log["history"] if not h.get("repeated")] == [60, 120, 180, 240]
    assert b'"skipped": 0' in workspace.metrics()


def test_a_corpus_more_and_a_corpus_less(workspace):
    "A second corpus runs its own stage and what comes after; the first is not imported again. Without it, all is as before."
    index = workspace.root/"data/index/train.json"
    before = index.read_bytes()
    words = "một hai ba bốn năm sáu bảy tám chín mười trăm nghìn".split()
    (workspace.root/"more").mkdir()
    (workspace.root/"more/sentences.vi.txt").write_text("".join(f"{a} {b} {a} con {b} {a}\n" for a in words[:6] for b in words[6:]), encoding="utf-8")
    workspace.change(dict(corpora=dict(more=dict(source="demo", path="more", dev_sentences=4, test_sentences=4))))
    assert workspace.repro("shards") == {"corpus@more", "prepare", "shards"}
    assert json.loads(index.read_text())["corpora"] == ["demo", "more"]
    workspace.change(dict(corpora=dict(more=None)))
    assert "data/corpus/more" in workspace.run("ai2text", "stage", "prepare", ok=False, stderr=True)
    shutil.rmtree(workspace.root/"data/corpus/more")
    workspace.repro("shards")
    assert index.read_bytes() == before
