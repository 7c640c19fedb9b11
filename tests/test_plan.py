"Plans: the stage from params.yaml to its report, its place in DVC's graph, and wrong questions."
import json, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from ai2text.core.files import read_json
from ai2text.core.params import ConfigError
from ai2text.pipeline.stage_runner import run_stage
from ai2text.testing.workspace import synthetic_runs
from ai2text.ttq.points import find_points
from ai2text.ttq.surface import check_points, fit_surface

ROOT = Path(__file__).parent.parent


def write_params(folder:Path, **item):
    "A params.yaml with one plan."
    (folder / "params.yaml").write_text(
        (ROOT / "params.yaml").read_text("utf-8").replace("plans: {}", f"plans: {json.dumps(dict(friday=item))}"), "utf-8"
    )


def test_plan_stage_writes_report_and_plan(tmp_path):
    "And names the fix of each wrong question."
    for name in ("dvc.yaml", "nbs", "ai2text"): (tmp_path/name).symlink_to(ROOT/name)
    question = dict(target=.3, label_price=25, compute_price=1.2, runs=["kept"])
    write_params(tmp_path, **question)
    with pytest.raises(Exception, match="kept: no such file or folder of runs"): run_stage("plan", plan="friday", root=tmp_path)
    synthetic_runs(tmp_path/"kept")
    report = tmp_path/run_stage("plan", plan="friday", root=tmp_path)
    text = report.read_text("utf-8")
    assert (
        report.name == "plan-friday.ipynb"
        and "image/png" in text
        and "30.0% with probability 50%: " in text
        and "WER 30.0% was already reached" in text
    )
    stored = read_json(tmp_path/"plans/0001.json")
    assert stored["target"] == .3 and len(stored["runs"]) == 11 and stored["experiments"]
    write_params(tmp_path, **question | dict(targt=.2))
    with pytest.raises(ConfigError, match="params.yaml: plans.friday.targt: no such parameter; did you mean target"):
        run_stage("plan", plan="friday", root=tmp_path)
    write_params(tmp_path, label_price=25, compute_price=1.2)
    with pytest.raises(ConfigError, match="plans.friday.*target, budget: both are 0"): run_stage("plan", plan="friday", root=tmp_path)
    write_params(tmp_path, target=.3, compute_price=1.2)
    with pytest.raises(ConfigError, match="plans.friday.label_price: missing"): run_stage("plan", plan="friday", root=tmp_path)
    with pytest.raises(ConfigError, match="add --plan and one of friday"): run_stage("plan", root=tmp_path)


def test_plan_depends_on_training_in_dvc(tmp_path):
    for name in ("params.yaml", "dvc.yaml"): shutil.copy(ROOT/name, tmp_path)
    write_params(tmp_path, target=.3, label_price=25, compute_price=1.2)
    def dvc(*command): return subprocess.run([sys.executable, "-m", "dvc", *command], cwd=tmp_path, capture_output=True, text=True)
    dvc("init", "-q", "--no-scm")
    done = dvc("dag", "--mermaid")
    assert done.returncode == 0, done.stderr
    names = {name: node for node, name in (line.strip().rstrip('"]').split('["') for line in done.stdout.splitlines() if '["' in line)}
    assert f"{names['train@conformer_ctc']}-->{names['plan@friday']}" in done.stdout


@pytest.mark.parametrize("kind,small,larger", [("demo", 11, 6), ("people", 6, 4)])
def test_larger_runs_are_predicted_from_small_ones(kind, small, larger):
    "Real runs: the small ones have at most half of the labels and of the training speech."
    points, _ = check_points(find_points(folders=[ROOT/"tests/runs"/kind])[0])
    half = {key: .51*max(getattr(p, key) for p in points) for key in ("label_hours", "audio_hours")}
    known = [p for p in points if all(getattr(p, key) <= most for key, most in half.items())]
    held = [p for p in points if p not in known]
    assert (len(known), len(held)) == (small, larger)
    surface = fit_surface(known)
    predicted = [np.quantile(surface.wer(p.label_hours, p.audio_hours, p.parameters, noise=True), (.1, .5, .9)) for p in held]
    errors = [abs(middle/p.wer - 1) for p, (_, middle, _) in zip(held, predicted)]
    baseline = np.median([abs(min(k.wer for k in known)/p.wer - 1) for p in held])
    assert np.median(errors) <= .1 and np.median(errors) < baseline, (errors, baseline)
    assert np.mean([low <= p.wer <= high for p, (low, _, high) in zip(held, predicted)]) >= .7, predicted
