"The whole pipeline, small: from nothing, killed, changed, changed back."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
M = "conformer_ctc"
SMOKE = dict(
    corpora=dict(demo=dict(sentences=60, dev_sentences=8, test_sentences=8)), prepare=dict(tokenizer="char"), shards=dict(shard_size=20),
    train=dict(max_steps=240, batch_seconds=8., warmup_steps=5, evaluate_every_steps=60, checkpoint_minutes=0.01, threads=1, seed=3),
    export=dict(min_utterances=1, runtime_utterances=2, max_wer_gap=1., max_int8_gap=1., chunks=[8], pasts=[8], untrained_chunks=True, threads=1))


def environment(**changes)->dict:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1", "PYTHONPATH": "", **changes}
    return {k: v for k, v in env.items() if v is not None}


class Workspace:
    "A copy of the project's files with small parameters, in a git repository of its own."
    def __init__(self, root:Path):
        self.root = root
        names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
        for name in filter(None, names):
            if {"papermill_runs", "results", "comparison", "dvc.lock"} & set(Path(name).parts) or not (ROOT/name).is_file(): continue
            (root/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/name, root/name)
        self.change(SMOKE)
        self.change(dict(models={M: dict(size="tiny")}))
        self.run("git", "init", "-q")

    def change(self, values:dict):
        "Write values into params.yaml; None takes a key out."
        yaml, path = YAML(), self.root/"params.yaml"
        params = yaml.load(path)
        def merge(old, new):
            for k, v in new.items():
                if isinstance(v, dict): merge(old.setdefault(k, {}), v)
                elif v is None: del old[k]
                else: old[k] = v
        merge(params, values)
        with open(path, "w", encoding="utf-8") as f: yaml.dump(params, f)

    def run(self, *command, ok=True, stderr=False, **changes)->str:
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, env=environment(**changes), stdin=subprocess.DEVNULL)
        assert done.returncode == 0 or not ok, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr*stderr

    def repro(self, *targets:str)->set:
        "Run the pipeline, or a part of it; the names of the stages that ran."
        return {line.split("'")[1] for line in self.run("dvc", "repro", *targets).splitlines() if line.startswith("Running stage")}

    def start(self, **changes)->subprocess.Popen:
        return subprocess.Popen(["dvc", "repro"], cwd=self.root, env=environment(**changes), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def folders(self)->set: return set(self.root.glob(f".runs/{M}/*/*/"))

    def wait_for_checkpoint(self, known:set, seconds:float=120.)->tuple:
        "Wait until a run that is not `known` has saved a step; its folder and the step."
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for folder in self.folders() - known:
                steps = [int(p.parent.name[5:]) for p in folder.glob("checkpoints/step-*/checkpoint.json")]
                if steps: return folder, max(steps)
            time.sleep(0.05)
        raise AssertionError(f"no checkpoint within {seconds} s")

    def log(self)->dict: return json.loads((self.root/f"results/{M}/ttq_log.json").read_text())
    def metrics(self)->bytes: return (self.root/f"results/{M}/metrics.json").read_bytes()
    def runs(self)->list: return sorted(p.parent.as_posix() for p in self.root.glob(f".runs/{M}/*/*/result.json"))
    def report(self, name:str)->Path: return self.root/f"papermill_runs/{name}.ipynb"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    "A workspace in which the pipeline ran once."
    w = Workspace(tmp_path_factory.mktemp("pipeline"))
    assert w.repro() == {"corpus@demo", "prepare", "shards", f"init@{M}", f"train@{M}", f"evaluate@{M}", "compare", "export"}
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
    workspace.change(dict(train=dict(lr=SMOKE["train"].get("lr", YAML().load(ROOT/"params.yaml")["train"]["lr"]))))
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
