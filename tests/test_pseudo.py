"Pseudo-labels from the teacher to the batches of a student: in train alone, weighted, and never from a model that is trained on them."
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
import torch

from ai2text.core.batch import Hypothesis
from ai2text.core.files import read_jsonl
from ai2text.core.layout import Layout
from ai2text.core.params import ConfigError, load_params
from ai2text.core.sections import PrepareConfig, ShardsConfig, section
from ai2text.corpora.prepare import prepare
from ai2text.data.loader import create_webdataset_loader
from ai2text.data.shards import write_shards
from ai2text.decoding.pseudo import make_pseudo
from ai2text.models.store import build_model, save_model
from ai2text.pipeline.stage_runner import run_stage
from ai2text.testing.workspace import tiny_workspace
from ai2text.text.tokenizer import CharTokenizer
from workspace import ROOT

WORDS = "ba bốn năm sáu bảy tám chín mười một hai".split()


class Teacher(torch.nn.Module):
    "Transcribes each utterance as a number; half of the transcripts have confidence 0.5."
    tokenizer = CharTokenizer()
    def __init__(self):
        super().__init__()
        self.at = torch.nn.Parameter(torch.zeros(1))
    def transcribe(self, batch):
        def digits(wave): return " ".join(WORDS[int(d)] for d in str(int(1e6*wave.abs().max())))
        return [Hypothesis(f"Số {digits(w)}.", score=math.log(0.9 if n % 2 else 0.5)) for w,n in zip(batch.audio, batch.lengths.tolist())]


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    "The demo, and its train recordings at other levels as an unlabelled corpus."
    layout = Layout(tiny_workspace("corpus"))
    (layout.root/"raw").mkdir()
    for i, row in enumerate(read_jsonl(layout.corpus_manifest("demo"))):
        if row["split"] != "train": continue
        wave, rate = sf.read(layout.corpus("demo")/row["audio_filepath"], dtype="float32")
        sf.write(layout.root/f"raw/{i:03d}.wav", (0.5 + i/100)*wave[:len(wave) - i % 2], rate)
    cfg = section("pseudo", dict(path="raw", teacher="teachers/none", threshold=0.8, agreement=1))
    assert min(make_pseudo(cfg, "mine", layout.corpus("mine"), layout.root, model=Teacher())) > 3
    return layout


@pytest.mark.parametrize("splits", ["source", "speaker"])
def test_pseudo_labels_are_in_train_alone_and_weighted(layout, splits):
    prepare(
        PrepareConfig(tokenizer="char", processes=1, splits=splits, dev_share=0.2, test_share=0.2, max_reject_share=0.5),
        layout.corpora, layout.prepared, ["demo", "mine"]
    )
    kept = {row["id"] for row in read_jsonl(layout.corpus_manifest("mine"))}
    for split in ("train", "dev", "test"):
        index = write_shards(
            read_jsonl(layout.manifest(split)), layout.split_shards(split), layout.split_index(split),
            ShardsConfig(shard_size=16, processes=1), audio_root=layout.prepared
        )
        assert index.corpora == (["demo", "mine"] if split == "train" else ["demo"])
    mine = {row["id"] for row in read_jsonl(layout.manifest("train")) if row["corpus"] == "mine"}
    assert mine and mine <= kept
    loader = create_webdataset_loader(layout.split_shards("train"), 8, 0, index=layout.split_index("train"), weights=dict(mine=0.5))
    seen = [id for _ in range(2) for batch in loader for id in batch.ids]
    assert {seen.count(id) for id in mine} == {1} and {seen.count(id) for id in seen if id not in mine} == {2}
    batch = next(iter(loader))
    assert all(text.written == f"Số {text.removeprefix('số ')}." for text, id in zip(batch.transcripts, batch.ids) if id in mine), (
        "a student with written output learns the teacher's written form"
    )


def test_human_transcripts_take_precedence(layout):
    "Pseudo-labels of recordings with human transcripts are all rejected, and the human transcripts kept."
    if layout.corpus("mine").exists(): shutil.rmtree(layout.corpus("mine"))
    cfg = PrepareConfig(tokenizer="char", processes=1, max_reject_share=0.9)
    prepare(cfg, layout.corpora, layout.prepared, ["demo"])
    people = [read_jsonl(layout.manifest(split)) for split in ("train", "dev", "test")]
    make_pseudo(
        section("pseudo", dict(path="data/corpus/demo/wav", teacher="teachers/none", threshold=0.0, agreement=1)),
        "again", layout.corpus("again"), layout.root, model=Teacher()
    )
    with pytest.raises(ConfigError, match=r"corpus again: all of its \d+ utterances were rejected; .* \d+ transcribed by people"):
        prepare(cfg, layout.corpora, layout.prepared, ["demo", "again"])
    assert {
        reject["corpus"] for reject in read_jsonl(layout.prepared / "rejects.jsonl") if reject["reason"] == "transcribed by people"
    } == {"again"}
    assert all(reject["corpus"] == "again" for reject in read_jsonl(layout.prepared/"rejects.jsonl")) and sum(map(len, people)) > 20


def test_dvc_runs_pseudo_before_prepare_and_refuses_a_cycle(tmp_path):
    "The graph alone; no stage runs."
    for name in ("params.yaml", "dvc.yaml"): shutil.copy(ROOT/name, tmp_path)
    def dvc(*command): return subprocess.run([sys.executable, "-m", "dvc", *command], cwd=tmp_path, capture_output=True, text=True)
    def graph(teacher):
        text = (
            (ROOT / "params.yaml")
            .read_text("utf-8")
            .replace("pseudo: {}", f"pseudo: {json.dumps(dict(mine=dict(path='raw', teacher=teacher)))}")
        )
        (tmp_path/"params.yaml").write_text(text, "utf-8")
        assert load_params(tmp_path/"params.yaml")["pseudo"]["mine"]["teacher"] == teacher
        return dvc("dag", "--mermaid")
    dvc("init", "-q", "--no-scm")
    done = graph("teachers/base")
    assert done.returncode == 0, done.stderr
    names = {name: node for node, name in (line.strip().rstrip('"]').split('["') for line in done.stdout.splitlines() if '["' in line)}
    assert f"{names['pseudo@mine']}-->{names['prepare']}" in done.stdout
    done = graph("models/conformer_ctc")
    assert done.returncode and "both a dependency and an output in stages" in done.stderr and "pseudo@mine" in done.stderr, done.stderr
    with pytest.raises(ConfigError, match="is trained by this pipeline, on the labels that it would write: a cycle"):
        make_pseudo(
            section("pseudo", dict(path="raw", teacher="models/conformer_ctc")), "mine", tmp_path / "data/corpus/mine",
            tmp_path, ["conformer_ctc"]
        )


def test_pseudo_stage_runs_from_params_and_names_a_typo(tmp_path):
    "Through the stage runner, from params.yaml to the report; any stage names a key with a typo."
    model = build_model(dict(family="conformer", size="tiny"), CharTokenizer())
    torch.nn.init.normal_(model.head.weight)
    save_model(tmp_path/"teachers/m", model, beside=lambda part: model.tokenizer.save(part/"tokenizer"), family="conformer")
    (tmp_path/"raw").mkdir()
    for i in range(3): sf.write(tmp_path/f"raw/{i}.wav", np.random.default_rng(i).uniform(-.3, .3, 8000*(i + 1)), 16_000)
    for name in ("dvc.yaml", "nbs", "ai2text"): (tmp_path/name).symlink_to(ROOT/name)

    def params(**item):
        (tmp_path / "params.yaml").write_text(
            (ROOT / "params.yaml").read_text("utf-8").replace("pseudo: {}", f"pseudo: {json.dumps(dict(mine=item))}"), "utf-8"
        )

    params(path="raw", teacher="teachers/m", threshold=0, agreement=1)
    report = tmp_path/run_stage("pseudo", corpus="mine", root=tmp_path)
    rows = read_jsonl(tmp_path/"data/corpus/mine/manifest.jsonl")
    assert report.name == "pseudo-mine.ipynb" and "utterances kept" in report.read_text("utf-8")
    assert rows and all(row["split"] == "train" and row["teacher"].startswith("m ") for row in rows)
    params(path="raw", teacher="teachers/m", treshold=0.5)
    for stage in (dict(name="pseudo", corpus="mine"), dict(name="shards")):
        with pytest.raises(ConfigError, match="params.yaml: pseudo.mine.treshold: no such parameter; did you mean threshold"):
            run_stage(**stage, root=tmp_path)
