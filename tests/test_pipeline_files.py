"dvc.yaml, params.yaml, the notebooks of the stages and the modules beneath must tell the same story."
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from papermill import inspect_notebook

from ai2text.core.code import import_closure
from ai2text.core.params import load_params
from ai2text.pipeline.stage_runner import EACH, SINGULAR, STAGES, stage_parameters

ROOT = Path(__file__).resolve().parent.parent
PARAMS = load_params(ROOT/"params.yaml")
DVC = load_params(ROOT/"dvc.yaml")["stages"]
PIPELINE = {name: stage.get("do", stage) for name, stage in DVC.items()}
MODELS = {name: EACH.get(name) == "models" for name in PIPELINE}


def notebook(name:str)->Path: return ROOT/f"nbs/stages/{name}.ipynb"


def options(stage:dict, kind:str)->dict:
    "The paths of a list of outputs, each with its options."
    return dict(next(iter(o.items())) if isinstance(o, dict) else (o, {}) for o in stage.get(kind, []))


def items(name:str)->list:
    "The items a stage runs once for, as options of the runner."
    return [{SINGULAR[EACH[name]]: key} for key in PARAMS[EACH[name]]] if name in EACH else [{}]


def test_every_stage_is_in_the_pipeline(): assert set(PIPELINE) == set(STAGES)


@pytest.mark.parametrize("name", PIPELINE)
def test_command(name):
    assert DVC[name].get("foreach") == ("${%s}" % EACH[name] if name in EACH else None)
    option = f" --{SINGULAR[EACH[name]]} ${{key}}" if name in EACH else ""
    assert PIPELINE[name]["cmd"] == f"exec python -m ai2text.pipeline.cli stage {name}{option}"


@pytest.mark.parametrize("name", PIPELINE)
def test_code_dependencies_are_the_imports(name):
    "A stage runs again when code changes that it imports, its model's family included, and only then."
    families = {m["family"] for m in PARAMS["models"].values()} if MODELS[name] else set()
    modules = [p for p in import_closure(notebook(name), *families, package=ROOT/"ai2text") if p.stem not in families]
    wanted = [f"nbs/stages/{name}.ipynb", *(p.relative_to(ROOT).as_posix() for p in modules), *["ai2text/${item.family}.py"] * MODELS[name]]
    listed = [d for d in PIPELINE[name]["deps"] if d.endswith((".py", ".ipynb"))]
    assert listed == wanted, f"dvc.yaml, deps of {name}: these belong there:\n" + "\n".join(f"      - {w}" for w in wanted)


@pytest.mark.parametrize("name", PIPELINE)
def test_parameters_fit(name):
    "params.yaml, dataclass and notebook have the same names, and every value is in range."
    for item in items(name): stage_parameters(name, PARAMS, list(inspect_notebook(notebook(name))), **item)
    depends = dict(corpus=["corpora.${key}"], prepare=["prepare", "corpora"], init=["init", "models.${key}"], train=["train", "milestones.${train.milestones}", "models.${key}"], evaluate=["evaluate", "models.${key}"],
                   compare=["compare", "models"])
    assert PIPELINE[name]["params"] == depends.get(name, [name])


def test_every_list_of_milestones_is_sound():
    from ai2text.ttq.log import read_milestones
    plan = [(m.wer, m.budget_hours) for m in read_milestones(PARAMS["milestones"]["plan"], "milestones.plan")]
    assert plan == [(0.30, 4), (0.20, 12), (0.15, 48), (0.10, 120)]
    for name, items in PARAMS["milestones"].items(): read_milestones(items, f"milestones.{name}")


def test_every_parameter_has_a_comment():
    lines = (ROOT/"params.yaml").read_text("utf-8").splitlines()
    for number, (above, line) in enumerate(zip(lines, lines[1:]), 2):
        if re.match(r" +\w+: +\S", line): assert " # " in line or above.strip().startswith("#"), f"params.yaml, line {number}: say what it is"


def test_dvc_fills_a_list_and_empties_it(tmp_path):
    "A comment behind an empty list makes DVC write a broken file the second time; above it, it does not."
    shutil.copy(ROOT/"params.yaml", tmp_path)
    for value in ("[missed, confirmed]", "[]", "[hopeless]", "[]"):
        apply_overrides(str(tmp_path/"params.yaml"), [f"train.stop_when={value}"])
        assert str(load_params(tmp_path/"params.yaml")["train"]["stop_when"]).replace("'", "") == value
    assert load_params(tmp_path/"params.yaml") == PARAMS


@pytest.mark.parametrize("name", PIPELINE)
def test_outputs(name):
    "The report is kept in git; nothing survives from one run to the next inside of DVC."
    outs = options(PIPELINE[name], "outs")
    report = f"papermill_runs/{name}{'-${key}' * (name in EACH)}.ipynb"
    assert outs[report] == dict(cache=False)
    for kind in ("outs", "metrics", "plots"):
        for path, given in options(PIPELINE[name], kind).items():
            assert "persist" not in given, f"dvc.yaml, {name}, {path}: a run in progress lives in .runs"
            assert path.startswith(("data/", "models/")) or given["cache"] is False, f"dvc.yaml, {name}, {path}: is small, so it belongs in git"


def test_dvc_reads_it():
    "No overlapping outputs, no cycles, and the stages of each corpus and model."
    listed = subprocess.run([sys.executable, "-m", "dvc", "stage", "list", "--name-only"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert set(listed) == {n for name in PIPELINE for n in ([f"{name}@{key}" for key in PARAMS[EACH[name]]] if name in EACH else [name])}
