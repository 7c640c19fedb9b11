"The whole pipeline on tiny data: its results, a second run, kills, and a parameter changed and changed back."
import json
import os
import signal
from pathlib import Path

import pytest

from conftest import too
from workspace import SMALL, M, Workspace


@pytest.fixture(scope="module")
def workspace(pipeline, tmp_path_factory):
    "A copy of a workspace after one run of the pipeline."
    return Workspace.copy(pipeline, tmp_path_factory.mktemp("pipeline"))


def test_second_run_in_another_folder_runs_no_stage(workspace): assert workspace.repro() == set()


def test_dvc_reads_the_results(workspace):
    log, metrics = workspace.log(), json.loads(workspace.metrics())
    assert log["finished"] and len(log["history"]) == 3 and metrics["steps"] == 60
    assert "WER on test" in workspace.run("ai2text", "summary")
    assert f"recommended: {M}" in workspace.run("ai2text", "compare")
    assert (workspace.root/"models/export/SHA256SUMS").exists()
    shown = workspace.run("dvc", "metrics", "show")
    assert "val_wer" in shown and "memory_bytes" in shown
    workspace.run("dvc", "plots", "show", f"results/{M}/learning_curve.csv", f"results/{M}/live")
    plots = (workspace.root/"dvc_plots/index.html").read_text("utf-8")
    assert "val_wer.tsv" in plots and "learning_curve.csv" in plots
    assert {"wer_60", "wer_40", "wer_30", "memory_bytes"} == json.loads((workspace.root/f"results/{M}/ttq.json").read_text()).keys()


KILLED = {"dvc without SHELL": 11, "dvc": 12, "group": 13} # process to kill -> a seed of its own


@pytest.mark.parametrize("what", ["dvc without SHELL", *too("dvc", "group")])
def test_killed_training_resumes_and_an_old_seed_is_not_trained_again(workspace, what):
    "The log counts the attempts. With the old seed results and report return without training, byte for byte."
    before = workspace.metrics(), workspace.report(f"train-{M}").read_bytes()
    stamps = {path: Path(path, "result.json").stat().st_mtime_ns for path in workspace.runs()}
    workspace.change(dict(train=dict(seed=KILLED[what])))
    known = workspace.folders()
    alive = workspace.start(f"train@{M}", **(dict(SHELL=None) if what == "dvc without SHELL" else {}))
    killed, saved = workspace.wait_for_checkpoint(known)
    if what == "group": os.killpg(alive.pid, signal.SIGKILL)
    else: os.kill(alive.pid, signal.SIGKILL)
    alive.wait()
    assert not (killed/"result.json").exists(), "training ended before it was killed"
    assert workspace.repro(f"train@{M}") == {f"train@{M}"}
    log = workspace.log()
    entries = [json.loads(line) for line in (killed/"ttq_log.jsonl").read_text().splitlines()]
    resumed = [e["step"] for e in entries if e["kind"] == "resume"]
    assert log["finished"] and log["totals"]["attempts"] == 2 and len(resumed) == 2 and resumed[1] >= saved > 0
    assert log["totals"]["down_hours"] > 0 and log["totals"]["elapsed_hours"] > 0
    assert [h["step"] for h in log["history"] if not h.get("repeated")] == [20, 40, 60]
    assert b'"skipped": 0' in workspace.metrics() and workspace.metrics() != before[0]

    workspace.change(dict(train=dict(seed=SMALL["train"]["seed"])))
    assert workspace.repro(f"train@{M}") == {f"train@{M}"}
    assert (workspace.metrics(), workspace.report(f"train-{M}").read_bytes()) == before
    assert {path: Path(path, "result.json").stat().st_mtime_ns for path in workspace.runs()} == {
        **stamps,
        str(killed): (killed / "result.json").stat().st_mtime_ns,
    }


@pytest.mark.slow
def test_pipeline_with_a_whisper_alone(workspace, tmp_path):
    "Without a streaming model, compare recommends the Whisper and export writes a bundle of its kind."
    w = Workspace.copy(workspace.root, tmp_path/"whisper")
    w.change(
        dict(models={M: None, "base": dict(family="whisper", size="demo", d_model=32, layers=1, heads=2, ff=64)}, compare=dict(latency=0.0))
    )
    assert "export.model: 'conformer_ctc' is none of the models; write one of base" in w.run("dvc", "repro", ok=False, stderr=True)
    w.change(dict(export=dict(model="base")))
    assert {"init@base", "train@base", "evaluate@base", "compare", "export"} <= w.repro()
    assert "recommended: base" in w.run("python", "-m", "ai2text.pipeline.cli", "compare")
    config = json.loads((w.root/"models/export/config.json").read_text("utf-8"))
    assert (config["kind"], config["name"]) == ("whisper", "base") and (w.root/"models/export/int8/model.bin").exists()
    w.change(dict(compare=dict(latency=1.)))
    assert w.repro() == {"compare", "export"} and "no model is allowed by this rule: of base, the quickest" in w.run(
        "python", "-m", "ai2text.pipeline.cli", "compare"
    )
