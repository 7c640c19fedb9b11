"Recordings under DVC: the stages that a changed clip or corpus runs, and the return to an earlier commit."
import json
import os
import shutil

import numpy as np
import pytest
import soundfile as sf
from dvc.repo import Repo

from workspace import Workspace, environment

STAGES = "corpus@demo", "corpus@mine", "prepare"


def clip(path, number, loud=1.):
    "A recording of four words, and its transcript; an old file is replaced, not written into, because it may be a link to DVC's cache."
    text = " ".join("một hai ba bốn năm sáu".split()[(number + k*(1 + number//6)) % 6] for k in range(4))
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".wav", ".txt"): path.with_suffix(suffix).unlink(missing_ok=True)
    sf.write(path.with_suffix(".wav"), np.sin(np.arange(25_600)*(0.1 + 0.01*number))*0.3*loud, 16_000)
    path.with_suffix(".txt").write_text(text, encoding="utf-8")


# The work of a stage without its notebook, which has its own tests: a fifth of the time.
RUNNER = """
import sys
from pathlib import Path
from ai2text.core.layout import Layout; from ai2text.core.params import load_params; from ai2text.core.sections import section
if sys.argv[1] in ("identity", "starts"):
    from ai2text.pipeline.stage_runner import write_identities, write_starts
    write_identities() if sys.argv[1] == "identity" else write_starts()
    sys.exit()
params, layout, stage = load_params("params.yaml"), Layout("."), sys.argv[2]
if stage == "corpus":
    from ai2text.corpora.corpus import make_corpus
    make_corpus(section("corpus", params["corpora"][sys.argv[4]]), sys.argv[4], layout.corpus(sys.argv[4]), layout.root)
else:
    from ai2text.corpora.prepare import prepare
    prepare(section("prepare", params["prepare"]), layout.corpora, layout.prepared, list(params["corpora"]), root=".")
report = layout.reports/f"{'-'.join([stage, *sys.argv[4:]])}.ipynb"
report.parent.mkdir(exist_ok=True)
report.write_text("{}")
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    for name, value in environment(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull).items(): monkeypatch.setenv(name, value)
    w = Workspace(tmp_path/"w")
    (w.root/"ai2text/pipeline/cli.py").write_text(RUNNER)
    w.change(
        dict(corpora=dict(demo=dict(sentences=12, dev_sentences=2, test_sentences=2), mine=dict(source="folder", path="data/raw/mine")))
    )
    monkeypatch.chdir(w.root)
    return w


def commit(w, message): w.run("git", "add", "-A"), w.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", message)
def changed_files(w): return sorted(w.run("git", "status", "--short", "-uall").split()[1::2])


def dvc(what, *arguments, **more):
    "A command of DVC, in this process."
    with Repo() as repo: return getattr(repo, what)(*arguments, **more)


def repro():
    return sorted(
        stage.addressing
        for stage in dvc("reproduce", ["prepare"])
        if stage.addressing not in ("identity", "starts") and not stage.addressing.endswith(".dvc")
    )


def outdated(): return sorted(dvc("status", [*STAGES, "data/raw/mine.dvc"]))


def test_a_changed_clip_or_corpus_runs_its_own_stages_and_a_checkout_runs_none(workspace):
    w, raw = workspace, workspace.root/"data/raw/mine"
    for i in range(40): clip(raw/f"speaker{i % 8}/u{i:02}", i)
    dvc("add", ["data/raw/mine"])
    assert repro() == [*STAGES]
    assert [name for name in changed_files(w) if name.startswith("data/")] == ["data/raw/mine.dvc"]
    commit(w, "one")
    assert not outdated() and repro() == []
    files = [w.root/"data/corpus/mine/manifest.jsonl", w.root/"data/prepared/train.jsonl", raw/"speaker1/u01.wav"]
    before = [path.read_bytes() for path in files]

    # One clip is quieter: its corpus and what follows run; the demo does not
    clip(raw/"speaker1/u01", 1, loud=0.5)
    assert outdated() == ["corpus@mine", "data/raw/mine.dvc"]
    assert repro() == ["corpus@mine", "prepare"]
    assert {"data/raw/mine.dvc", "dvc.lock"} <= set(changed_files(w)) and not outdated() # DVC records the new content by itself
    after = files[0].read_bytes()
    assert after != before[0] and len(after.splitlines()) == 40
    commit(w, "two")

    # One clip is removed
    for suffix in (".wav", ".txt"): (raw/"speaker2/u02").with_suffix(suffix).unlink()
    assert outdated() == ["corpus@mine", "data/raw/mine.dvc"]

    # Back to the first commit: everything is restored, and nothing runs
    w.run("git", "checkout", "-q", "HEAD~1")
    dvc("checkout", [*STAGES, "data/raw/mine.dvc"], force=True)
    assert [path.read_bytes() for path in files] == before and (raw/"speaker2/u02.wav").is_file()
    assert not outdated() and repro() == []

    # Without the corpus its folder must be removed too; the demo is not imported again, also when the corpus returns
    mine = dict(source="folder", path="data/raw/mine")
    w.change(dict(corpora=dict(mine=None)))
    assert "data/corpus/mine" in w.run("dvc", "repro", "prepare", ok=False, stderr=True)
    shutil.rmtree(w.root/"data/corpus/mine")
    assert repro() == ["prepare"] and {json.loads(line)["corpus"] for line in files[1].read_text().splitlines()} == {"demo"}
    w.change(dict(corpora=dict(mine=mine)))
    assert repro() == ["corpus@mine", "prepare"]
    assert [path.read_bytes() for path in files] == before
