"dvc.yaml, params.yaml, the stage notebooks and the modules are consistent."
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from papermill import inspect_notebook

from ai2text.core.params import load_params
from ai2text.core.sections import SECTIONS
from ai2text.models.registry import FAMILIES
from ai2text.pipeline.stage_runner import EACH, FAMILY_STAGES, SINGULAR, STAGES, stage_identity, stage_parameters
from workspace import environment

ROOT = Path(__file__).resolve().parent.parent
PARAMS = load_params(ROOT/"params.yaml")
DVC = load_params(ROOT/"dvc.yaml")["stages"]
PIPELINE = {name: stage.get("do", stage) for name, stage in DVC.items() if name not in ("identity", "starts")}
COMPARE = {name: stage.get("do", stage) for name, stage in load_params(ROOT/"compare/dvc.yaml")["stages"].items()}


def notebook(name:str)->Path: return ROOT/f"nbs/stages/{name}.ipynb"


def options(stage:dict, kind:str)->dict:
    "The paths of a list of outputs, each with its options."
    return dict(next(iter(o.items())) if isinstance(o, dict) else (o, {}) for o in stage.get(kind, []))


def items(name:str)->list:
    "The items of a stage, as options of the runner."
    return [{SINGULAR[EACH[name]]: key} for key in PARAMS[EACH[name]]] if name in EACH else [{}]


def test_every_stage_is_in_the_pipeline(): assert set(PIPELINE) == set(STAGES)


@pytest.mark.parametrize("name", PIPELINE)
def test_command_of_a_stage(name):
    assert DVC[name].get("foreach") == ("${%s}" % EACH[name] if name in EACH else None)
    option = f" --{SINGULAR[EACH[name]]} ${{key}}" if name in EACH else ""
    assert PIPELINE[name]["cmd"] == f"exec python -m ai2text.pipeline.cli stage {name}{option}"


@pytest.mark.parametrize("name", PIPELINE)
def test_stage_depends_on_its_code_by_its_identity(name):
    "One file of identity/ for notebook, modules and defaults; a module as a dependency would rerun the stage after an edited comment."
    of_model = EACH.get(name) == "models"
    for stages, folder in ((PIPELINE, "identity"), (COMPARE, "../identity")):
        if name not in stages: continue
        wanted = f"{folder}/{name}{'-${item.family}' if of_model else ''}.json"
        code = [d for d in stages[name]["deps"] if d.endswith((".py", ".ipynb")) or "identity/" in d]
        assert code == [wanted], f"dvc.yaml, deps of {name}: {code}; of code, write {wanted} and nothing else"


@pytest.mark.parametrize("name", STAGES)
def test_identities_are_up_to_date(name):
    for family in FAMILIES if name in FAMILY_STAGES else ("",):
        path = ROOT/f"identity/{name}{family and '-'}{family}.json"
        assert path.is_file() and json.loads(path.read_text()) == stage_identity(name, notebook(name), family), (
            f"{path.relative_to(ROOT)} is out of date: run `ai2text identity`"
        )
    assert {p.stem.split("-")[0] for p in (ROOT / "identity").iterdir()} == set(STAGES), (
        "identity/ has files of unknown stages: run `ai2text identity`"
    )


def test_identity_stage_depends_on_all_code():
    stage = DVC["identity"]
    assert stage["deps"] == ["ai2text", "nbs/stages"] and options(stage, "outs") == dict(identity=dict(cache=False))


def test_changed_initial_weights_are_detected():
    "The hashes of a folder of weights are written at each `dvc repro`, and kept if the folder is missing."
    stage = DVC["starts"]
    assert (
        stage["always_changed"]
        and options(stage, "outs") == dict(starts=dict(cache=False, persist=True))
        and "starts/${key}.json" in PIPELINE["init"]["deps"]
    )
    assert {p.stem for p in (ROOT/"starts").glob("*.json")} == set(PARAMS["models"])


def test_changed_lists_outside_of_a_corpus_are_detected(tmp_path):
    "A changed list reruns the stage of its corpus alone; no change, and a change of another file beside the list, reruns nothing."
    for name in ("corpus", "pseudo"): assert "starts/lists/${key}.json" in PIPELINE[name]["deps"]
    assert {p.stem for p in (ROOT/"starts/lists").iterdir()} == {*PARAMS["corpora"], *PARAMS["pseudo"]}
    corpora = {name: dict(source="csv", path=f"data/{name}", transcripts=f"../lists/{name}.csv") for name in ("one", "two")}
    for name in corpora:
        (tmp_path/f"data/{name}").mkdir(parents=True)
        (tmp_path/f"data/{name}/a.wav").touch()
    (tmp_path/"data/lists").mkdir()
    for name in ("one", "two", "other"): (tmp_path/f"data/lists/{name}.csv").write_text("file_name,text\na.wav,một\n")
    reader = dict(cmd="echo ${key} > ${key}.txt", deps=[d for d in PIPELINE["corpus"]["deps"] if "identity" not in d], outs=["${key}.txt"])
    (tmp_path/"params.yaml").write_text(json.dumps(dict(corpora=corpora)))
    (tmp_path/"dvc.yaml").write_text(
        json.dumps(dict(stages=dict(starts=DVC["starts"], corpus={"foreach": "${corpora}", "do": reader})))
    )
    def dvc(*command):
        return subprocess.run([sys.executable, "-m", "dvc", *command], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), check=True,
                              capture_output=True, text=True).stdout
    def ran(): return set(re.findall("^Running stage '(.+?)'", dvc("repro"), flags=re.M))
    dvc("init", "--no-scm", "-q")
    assert ran() == {"starts", "corpus@one", "corpus@two"} and ran() == {"starts"}
    for name, stages in (("one", {"corpus@one"}), ("other", set())):
        (tmp_path/f"data/lists/{name}.csv").write_text("file_name,text\na.wav,hai\n")
        assert ran() == {"starts"} | stages


@pytest.mark.parametrize("name", PIPELINE)
def test_parameters_of_a_stage_are_valid(name):
    "params.yaml, dataclass and notebook have the same names, and all values are in range."
    for item in items(name): stage_parameters(name, PARAMS, list(inspect_notebook(notebook(name))), **item)
    depends = dict(
        corpus=["corpora.${key}"], pseudo=["pseudo.${key}"], prepare=["prepare", "corpora", "pseudo"],
        init=["init", "models.${key}"], train=["train", "hardware", "milestones.${train.milestones}", "models.${key}"],
        evaluate=["stream", "models.${key}"], compare=["compare", "models"], export=["export", "stream", "corpora"],
        plan=["plans.${key}"]
    )
    assert PIPELINE[name]["params"] == depends.get(name, [name])


def test_every_list_of_milestones_is_valid():
    from ai2text.ttq.log import read_milestones
    plan = [(m.wer, m.budget_hours) for m in read_milestones(PARAMS["milestones"]["plan"], "milestones.plan")]
    assert plan == [(0.30, 4), (0.20, 12), (0.15, 48), (0.10, 120)]
    for name, items in PARAMS["milestones"].items(): read_milestones(items, f"milestones.{name}")


@pytest.mark.parametrize("file", ["params.yaml", "compare/params.yaml"])
def test_comment_of_a_parameter_is_the_help_of_its_field(file):
    section, lines = "", (ROOT/file).read_text("utf-8").splitlines()
    for above, line in zip(["", *lines], lines):
        if found := re.match(r"(\w+):", line): section = dict(corpora="corpus").get(found[1], found[1])
        found = re.match(r" +(\w+): +(?!#|\{\w)\S", line) # a recipe in one line has the keys of the one above it
        if not found or section not in SECTIONS or line.lstrip().startswith("#"): continue
        field = next(f for f in dataclasses.fields(SECTIONS[section]) if f.name == found[1])
        comment = line.partition(" # ")[2] or above.strip().removeprefix("# ")
        assert comment == field.metadata["help"], f"{file}: {section}.{field.name}: write # {field.metadata['help']}"


def test_dvc_sets_and_clears_a_list(tmp_path):
    "A comment behind an empty list makes DVC write a broken file the second time; a comment above it does not."
    shutil.copy(ROOT/"params.yaml", tmp_path)
    for value in ("[missed, confirmed]", "[]", "[hopeless]", "[]"):
        apply_overrides(str(tmp_path/"params.yaml"), [f"train.stop_when={value}"])
        assert str(load_params(tmp_path/"params.yaml")["train"]["stop_when"]).replace("'", "") == value
    assert load_params(tmp_path/"params.yaml") == PARAMS


@pytest.mark.parametrize("name", PIPELINE)
def test_outputs_of_a_stage(name):
    "The report is kept in git; no output persists between runs."
    outs = options(PIPELINE[name], "outs")
    report = f"papermill_runs/{name}{'-${key}' * (name in EACH)}.ipynb"
    assert outs[report] == dict(cache=False)
    for kind in ("outs", "metrics", "plots"):
        for path, given in options(PIPELINE[name], kind).items():
            assert "persist" not in given, f"dvc.yaml, {name}, {path}: an unfinished run belongs in .runs"
            assert path.startswith(("data/", "models/")) or given["cache"] is False, (
                f"dvc.yaml, {name}, {path}: is small, so it belongs in git"
            )


def test_dvc_lists_the_stages():
    "No overlapping outputs, no cycles, and the stages of each corpus and model."
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(listed) == {"identity", "starts"} | {
        n for name in PIPELINE for n in ([f"{name}@{key}" for key in PARAMS[EACH[name]]] if name in EACH else [name])
    }
