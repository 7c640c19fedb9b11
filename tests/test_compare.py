"The pipeline of compare/ with three small families and equal budgets."
import json

import pytest
from papermill import inspect_notebook
from conftest import ROOT
from ruamel.yaml import YAML
from workspace import M, Workspace

from ai2text.core.params import load_params
from ai2text.pipeline.stage_runner import EACH, STAGES, stage_parameters

PARAMS, MAIN = load_params(ROOT/"compare/params.yaml"), load_params(ROOT/"params.yaml")
STEPS = 6
TINY = dict(conformer=dict(size="tiny"), wav2vec=dict(size="tiny"), whisper=dict(d_model=32, layers=1, heads=2, ff=64))


def test_parameters_have_the_keys_of_the_project():
    for name in set(PARAMS) - {"models", "milestones", "hardware"}: assert set(PARAMS[name]) == set(MAIN[name]), name
    for name, recipe in PARAMS["hardware"].items(): assert set(recipe) == set(MAIN["hardware"][name]), name
    for name in ("init", "train", "evaluate", "compare"):
        wanted = list(inspect_notebook(ROOT/f"nbs/stages/{name}.ipynb"))
        for model in PARAMS["models"] if name in EACH else [None]:
            stage_parameters(name, PARAMS, wanted, **({"model": model} if model else {}))


def test_stages_are_those_of_the_project():
    "The same commands, outputs, parameters and dependencies; shared data is in the enclosing project."
    here, main = (load_params(ROOT/folder/"dvc.yaml")["stages"] for folder in ("compare", "."))
    assert set(here) <= set(main) & set(STAGES)
    for name, stage in here.items():
        mine, theirs = stage.get("do", stage), main[name].get("do", main[name])
        rest = lambda stage: {k: v for k, v in stage.items() if k not in ("cmd", "deps")}
        assert rest(mine) == rest(theirs)
        assert mine["cmd"] == theirs["cmd"].replace("exec python", "exec env PYTHONPATH=.. python") # the package of this copy
        known = [d for d in theirs["deps"] if not d.startswith("starts/")]  # all models start from random weights
        assert [d.removeprefix("../") for d in mine["deps"]] == known, name
        assert all(m.get("init", "scratch") == "scratch" for m in PARAMS["models"].values()), name


def test_three_families_have_equal_budgets():
    assert {m["family"] for m in PARAMS["models"].values()} == {"conformer", "whisper", "wav2vec"}
    assert PARAMS["train"]["max_hours"]
    budgets = {"max_steps", "max_hours", "max_audio_hours"}
    assert not any(budgets & set(m.get("train", {})) for m in PARAMS["models"].values())


@pytest.fixture(scope="module")
def workspace(pipeline, tmp_path_factory):
    "A copy of the project with small models, compared."
    w = Workspace.copy(pipeline, tmp_path_factory.mktemp("project"))
    yaml, path = YAML(), w.root/"compare/params.yaml"
    params = yaml.load(path)
    params["train"].update(
        max_steps=STEPS, max_hours=0.0, batch_seconds=8.0, evaluate_every_steps=3, evaluate_every_minutes=0.0, amp_dtype="fp32", threads=1
    )
    for name, model in params["models"].items(): model.update(TINY[name])
    with open(path, "w", encoding="utf-8") as f: yaml.dump(params, f)
    w.ran = w.repro("compare/dvc.yaml")
    return w


@pytest.mark.slow
def test_families_side_by_side(workspace):
    models = list(PARAMS["models"])
    assert {f"{stage}@{m}" for stage in ("init", "train", "evaluate") for m in models} | {"compare"} == {
        s.rpartition(":")[2] for s in workspace.ran if s.startswith("compare/")
    }
    comparison = json.loads((workspace.root/"compare/comparison/compare.json").read_text())
    assert [m["model"] for m in comparison["models"]] == models and comparison["recommendation"]["model"] == "conformer"
    for m in models: assert json.loads((workspace.root/f"compare/results/{m}/metrics.json").read_text())["steps"] == STEPS
    assert {p.name for p in (workspace.root / "models").glob("[!.]*")} == {M, "init", "runs", "export"} and not (
        workspace.root / "compare/data"
    ).exists()
    assert (workspace.root/"compare/papermill_runs/compare.ipynb").exists()


@pytest.mark.slow
def test_a_second_repro_runs_nothing(workspace): assert workspace.repro("compare/dvc.yaml") == set()


@pytest.mark.slow
def test_command_line_prints_the_recommendation(workspace):
    env = dict(PYTHONPATH=str(workspace.root))
    out = workspace.run("sh", "-c", "cd compare && python -m ai2text.pipeline.cli compare", **env)
    assert "recommended: conformer" in out and "one run of each model" in out
    out = workspace.run("sh", "-c", "cd compare && python -m ai2text.pipeline.cli compare --rev nosuch", ok=False, stderr=True, **env)
    assert "metrics.json at nosuch" in out and "Traceback" not in out
