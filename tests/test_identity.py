"Which edits of notebooks change the identity of a run and of the stages."
import json
import re
import shutil
import subprocess
import sys

import pytest
from nbdev.export import nb_export

from ai2text.core.code import identity
from ai2text.models.registry import FAMILIES
from ai2text.pipeline.stage_runner import FAMILY_STAGES, STAGES, stage_identity
from conftest import LIBRARY, ROOT

RUN = "training.setup", "models.conformer" # the roots of a run's identity


class Project:
    "A copy of notebooks and package, to edit."
    def __init__(self, root):
        self.root = root
        for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT/name, root)
        for name in ("nbs", "ai2text"): shutil.copytree(ROOT/name, root/name, ignore=shutil.ignore_patterns("__pycache__", ".*"))

    def edit(self, notebook, old, new, kind="code"):
        "Replace the first match of a regular expression in the cells of a kind, and export."
        path = self.root/f"nbs/{notebook}.ipynb"
        nb = json.loads(path.read_text("utf-8"))
        cells = [c for c in nb["cells"] if c["cell_type"] == kind and re.search(old, "".join(c["source"]))]
        assert cells, f"{notebook} has no {old!r}: update this test"
        cells[0]["source"] = re.sub(old, new, "".join(cells[0]["source"]), count=1).splitlines(keepends=True)
        path.write_text(json.dumps(nb), "utf-8")
        self.export(path)

    def export(self, path): nb_export(str(path), lib_path=str(self.root/"ai2text"))

    def move(self, notebook, to):
        "Change number or room of a notebook, and all imports of it."
        old, new = (n.split("/")[0] + "." + n.split("/")[1][3:] for n in (notebook, to))
        (self.root/f"nbs/{notebook}.ipynb").rename(self.root/f"nbs/{to}.ipynb")
        if old != new:
            (self.root/f"ai2text/{old.replace('.', '/')}.py").unlink()
            for path in (self.root/"nbs").rglob("*.ipynb"):
                text = path.read_text("utf-8")
                path.write_text(text.replace(f"default_exp {old}", f"default_exp {new}").replace(f"ai2text.{old} ", f"ai2text.{new} "),
                                "utf-8")
                if f"ai2text.{old} " in text: self.export(path)
        self.export(self.root/f"nbs/{to}.ipynb")

    def run(self): return identity(*RUN, package=self.root/"ai2text")

    def stages(self):
        "The identities that DVC compares: one for each stage and family."
        return {f"{name} {family}": stage_identity(name, self.root/f"nbs/stages/{name}.ipynb", family, self.root/"ai2text")
                for name in STAGES for family in (FAMILIES if name in FAMILY_STAGES else [""])}


@pytest.fixture
def project(tmp_path): return Project(tmp_path)


WORDS = {
    "docstring edited": lambda p: p.edit("training/30_trainer", r'(class TrainerOptimized\b.*\n    )"', r'\1"Edited: '),
    "comment edited": lambda p: p.edit("training/30_trainer", r"(def __init__\(self,\n[^#\n]*)# .*", r"\1# edited"),
    "markdown edited": lambda p: p.edit("training/30_trainer", r"\Z", "\nEdited.", "markdown"),
    "notebook renumbered": lambda p: p.move("audio/20_augment", "audio/25_augment"),
    "notebook moved to another room": lambda p: p.move("audio/20_augment", "models/05_augment"),
    "plot changed": lambda p: p.edit("ttq/30_plots", r"figsize=\(", "figsize=(1 + "),
    "forecast changed": lambda p: p.edit("ttq/00_forecast", "SHARED = 0.2", "SHARED = 0.3")}
CODE = {
    "loss changed": lambda p: p.edit("models/00_ctc", "zero_infinity=True", "zero_infinity=False"),
    "augmentation changed": lambda p: p.edit("audio/20_augment", "freq_masks:int=2", "freq_masks:int=3"),
    "optimizer changed": lambda p: p.edit("training/10_optimizer", r"A, B, C = 3\.4445", "A, B, C = 3.4"),
    "loader order changed": lambda p: p.edit("data/40_sampler", "JITTER = 0.05", "JITTER = 0.06")}


@pytest.mark.parametrize("kind", WORDS)
def test_an_edit_of_words_or_figures_changes_no_identity(project, kind):
    run, stages = project.run(), project.stages()
    WORDS[kind](project)
    assert project.run() == run, f"{kind}: an unfinished run would restart"
    assert {name: found for name, found in project.stages().items() if found != stages[name]} == {}, f"{kind}: DVC would repeat these"


@pytest.mark.parametrize("kind", CODE)
def test_an_edit_that_can_change_weights_changes_the_identity(project, kind):
    run, stages = project.run(), project.stages()
    CODE[kind](project)
    changed = {name.split()[0] for name, found in project.stages().items() if found != stages[name]}
    assert project.run() != run and "train" in changed
    assert not changed & {"corpus", "prepare", "shards"}, "stages before training must not change"


def executed(code):
    "The modules of ai2text whose functions are called by `code`."
    script = f"""
import json, sys, threading
found = set()
def profile(frame, event, arg):
    if event == "call" and (name := frame.f_globals.get("__name__") or "").startswith("ai2text."): found.add(name.removeprefix("ai2text."))
{code}
sys.setprofile(None); threading.setprofile(None)
print(json.dumps(sorted(found)))"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_module_called_in_training_is_in_the_identity_of_a_run():
    "A module with a function called between set-up and the last step is in the identity, or listed here with the reason why not."
    ran = executed("""
from ai2text.core.sections import section
from ai2text.core.layout import Layout
from ai2text.core.distributed import Ranks
from ai2text.testing.workspace import tiny_workspace
from ai2text.training import setup
from ai2text.training.budget import Every
from ai2text.models.store import load_model
layout = Layout(tiny_workspace("init"))
config = section("train", dict(max_steps=3, warmup_steps=0, amp_dtype="fp32", threads=1, evaluate_every_steps=2, ema_decay=0.9))
model = load_model(layout.init("m"))
threading.setprofile(profile); sys.setprofile(profile)
trainer, loader = setup.set_up(config, model, layout, Ranks())
evaluate, _ = setup.dev_scorer(trainer, config, layout, Ranks())
trainer.fit(loader, config.budget, (), layout.root/"run", evaluate=evaluate, evaluate_every=Every(2))""")
    harmless = {"core.sections": "the values are compared themselves", "models.registry": "the family is in the model's configuration"}
    known = {m: m.split(".")[1] for m in ran - set(harmless)}
    missing = {m for m, name in known.items() if name not in identity(*RUN)}
    some = {"models.conformer", "models.ctc", "training.trainer", "training.optimizer", "data.loader", "data.sampler",
            "audio.augment", "evaluation.metrics"}
    assert some <= ran, (
        "the profiler misses modules")
    assert not missing, (
        f"{missing} run in training and are not in the identity of a run: "
        "import them in training/50_setup, directly or indirectly, under a name not in `NOT_FOLLOWED` of core/30_code")


def test_no_identity_includes_test_modules_or_figures():
    stems = {o.path.stem[3:] for o in LIBRARY if o.room == "testing"} | {"plots", "tables", "examples", "forecast"}
    for name in STAGES:
        for family in FAMILIES if name in FAMILY_STAGES else [""]:
            found = stems & set(stage_identity(name, ROOT/f"nbs/stages/{name}.ipynb", family)["modules"])
            assert not found, f"{name}: {found} must not be in the identity"


def test_an_unresolved_import_is_an_error(project):
    path = project.root/"ai2text/training/optimizer.py"
    path.write_text(path.read_text() + "\nfrom .optimizers import Lion\n")
    line = len(path.read_text().splitlines())
    with pytest.raises(ValueError, match=re.escape(f"optimizer.py, line {line}: ai2text.training.optimizers is not a module of")):
        project.run()
