"Training in clones without data, which stream their shards from a DVC remote on a real S3 server."
import contextlib
import csv
import hashlib
import json
import shutil
import subprocess
from dataclasses import asdict

import pytest

import ai2text.data.loader
import ai2text.data.storage
from ai2text.core.files import read_jsonl
from ai2text.core.layout import Layout
from ai2text.core.params import load_params, make
from ai2text.core.sections import CorpusConfig
from ai2text.corpora.corpus import make_corpus
from ai2text.evaluation.evaluate import evaluate
from ai2text.testing.s3_faults import KEY, SECRET, Faults, bad_line, serve_s3
from ai2text.corpora.checks import SPLITS
from ai2text.core.sections import PrepareConfig
from ai2text.corpora.prepare import prepare
from ai2text.core.distributed import Ranks
from ai2text.core.sections import InitConfig, StreamConfig
from ai2text.training.init import init
from ai2text.training.run import train_rank
from ai2text.core.sections import TrainConfig
from ai2text.data.storage import Cache, Server, client
from ai2text.data.shard_index import ShardError, load_index
from ai2text.core.sections import ShardsConfig
from ai2text.data.shards import write_shards
from workspace import ROOT, M, Workspace

pytestmark = pytest.mark.slow
STEPS = dict(max_steps=12, evaluate_every_steps=6)
PULLING = "--pull", "--allow-missing"


def config(w, cls, section): return make(cls, load_params(w.root/"params.yaml")[section], section)


def make_data(w):
    "Make the outputs of the stages up to `init` by their functions. Reports are not read; those of the project are copied."
    layout, params = Layout(w.root), load_params(w.root/"params.yaml")
    if not layout.prepared.exists():
        make_corpus(make(CorpusConfig, params["corpora"]["demo"] | dict(path=str(w.root/"ai2text/demo"), processes=1), "demo"), "demo",
                    layout.corpus("demo"))
        prepare(config(w, PrepareConfig, "prepare"), layout.corpora, layout.prepared)
    for split in SPLITS:
        write_shards(read_jsonl(layout.manifest(split)), layout.split_shards(split), layout.split_index(split),
                     config(w, ShardsConfig, "shards"), audio_root=layout.prepared)
    init(M, config(w, InitConfig, "init"), params["models"][M], layout)
    shutil.copytree(ROOT/"papermill_runs", layout.reports, dirs_exist_ok=True, ignore=shutil.ignore_patterns("benchmarks"))


def train_here(w, **changes):
    "Train; returns curve and metrics."
    w.train(**changes)
    return result(w)


def result(w, path=None):
    "Curve without times, and metrics."
    with open(path or w.root/f"results/{M}/learning_curve.csv", newline="") as f:
        curve = [{k: v for k, v in row.items() if k != "hours"} for row in csv.DictReader(f)]
    assert curve
    return curve, w.metrics()


def keep(w, tag, *stages):
    "Commit the outputs to DVC and git, push, and tag."
    w.run("dvc", "commit", "-q", "-f", *stages)
    w.run("dvc", "push", "-q", **KEYS)
    for command in (("add", "-A"), ("-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", tag), ("tag", tag)):
        w.run("git", *command)


KEYS = dict(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
FIRST = "identity", "corpus@demo", "prepare", "shards", f"init@{M}"


class Clone(Workspace):
    "A clone with its own caches and no data."
    def __init__(self, origin, root):
        self.root, self.caches = root, root.with_name(f"{root.name} caches")
        subprocess.run(["git", "clone", "-q", str(origin.root), str(root)], check=True)

    def run(self, *command, **how): return super().run(*command, **dict(KEYS, XDG_CACHE_HOME=str(self.caches)) | how)

    def here(self, monkeypatch, url, secret=SECRET):
        "Use its caches and a server in this process."
        monkeypatch.setenv("XDG_CACHE_HOME", str(self.caches))
        (self.root/".dvc/config.local").write_text(f"['remote \"far\"']\n    endpointurl = {url}\n    access_key_id = {KEY}\n    "
                                                   f"secret_access_key = {secret}\n")

    def cached(self): return {p.name for p in (self.caches/"ai2text/shards").glob("[0-9a-f]*") if p.suffix != ".part"}


def digests(w, *splits): return {s["sha256"] for split in splits for s in load_index(Layout(w.root).split_index(split)).shards}


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    "A real S3 server with an empty bucket `bucket`: its folder and URL."
    folder = tmp_path_factory.mktemp("store")
    (folder/"bucket").mkdir()
    with serve_s3(folder) as url: yield folder, url


@pytest.fixture(scope="module")
def origin(far, tmp_path_factory):
    "The project with the data. The tag `one` has no model; `two` has other shards and a trained model."
    w = Workspace(tmp_path_factory.mktemp("origin"))
    (w.root/".dvc/config").write_text(f"[core]\n    remote = far\n    analytics = false\n['remote \"far\"']\n    url = s3://bucket/dvc\n   "
                                      f" endpointurl = {far[1]}\n")
    w.change(dict(corpora=dict(demo=dict(sentences=30, dev_sentences=4, test_sentences=4)), prepare=dict(processes=1),
                  shards=dict(shard_size=10, processes=1),
                  train=STEPS))
    make_data(w)
    keep(w, "one", *FIRST)
    w.first = train_here(w)
    w.old = digests(w, "train", "dev")
    w.change(dict(shards=dict(seed=1)))
    make_data(w)
    assert not w.old & digests(w, "train")
    w.second = train_here(w)
    keep(w, "two", "shards", f"init@{M}", f"train@{M}")
    return w


@pytest.fixture(scope="module")
def clone(origin, tmp_path_factory): return Clone(origin, tmp_path_factory.mktemp("clones")/"b")


def test_unchanged_stages_run_and_download_nothing(clone):
    assert clone.repro(*PULLING, f"train@{M}") == set()
    assert not (clone.root/"data").exists() and not clone.caches.exists()
    assert clone.run("git", "status", "--short") == ""


def test_a_changed_parameter_trains_on_streamed_shards(origin, clone, far, monkeypatch):
    "One command pulls small files and streams the shards; results equal those from local shards except for times. Evaluation likewise."
    clone.change(dict(train=dict(seed=4)))
    assert clone.repro(*PULLING, f"train@{M}") == {f"train@{M}"}
    assert not (clone.root/"data/shards").exists() and not (clone.root/"data/corpus").exists()
    assert clone.cached() == digests(origin, "train", "dev")
    expected = train_here(origin, seed=4)
    assert result(clone) == expected != origin.second
    clone.run("dvc", "pull", "-q", "data/index", "data/prepared")
    clone.here(monkeypatch, far[1])
    for w in (origin, clone): evaluate(M, StreamConfig(), Layout(w.root))
    assert clone.cached() == digests(origin, "train", "dev", "test")
    for name in ("eval.json", "utterances.jsonl"):
        assert (clone.root/f"results/{M}-eval"/name).read_bytes() == (origin.root/f"results/{M}-eval"/name).read_bytes()


def test_an_older_tag_trains_on_the_older_shards(origin, far, tmp_path, monkeypatch):
    clone = Clone(origin, tmp_path/"b")
    clone.run("git", "checkout", "-q", "one")
    clone.run("dvc", "pull", "-q", "data/index", "data/prepared", f"models/init/{M}")
    clone.here(monkeypatch, far[1])
    assert train_here(clone) == origin.first != origin.second
    assert clone.cached() == origin.old


@pytest.fixture
def bare(origin, far, tmp_path, monkeypatch):
    "A clone with all that training needs except the shards; this process uses its caches and the server."
    clone = Clone(origin, tmp_path/"b")
    for part in ("data/index", "data/prepared", f"models/init/{M}"): shutil.copytree(origin.root/part, clone.root/part)
    clone.here(monkeypatch, far[1])
    return clone


def test_a_corrupt_object_stops_training_until_it_is_replaced(origin, far, tmp_path, monkeypatch):
    "The error names the object and the fix, and no model is written."
    clone, (folder, url) = Clone(origin, tmp_path/"b"), far
    clone.change(dict(train=dict(seed=5)))
    shard = Layout(origin.root).split_shards("train")/"shard-000000.tar"
    md5 = hashlib.md5(shard.read_bytes(), usedforsecurity=False).hexdigest() # DVC's name for it
    key = f"dvc/files/md5/{md5[:2]}/{md5[2:]}"
    with open(folder/"bucket"/key, "r+b") as f:
        f.seek(1000)
        byte = f.read(1)[0]
        f.seek(1000)
        f.write(bytes([byte ^ 1]))
    output = clone.run("dvc", "repro", *PULLING, f"train@{M}", ok=False, stderr=True)
    assert f"ShardError: s3://bucket/{key}: has SHA-256" in output and "failed to reproduce" in output
    assert "replace it with the right shard" in output
    assert not (clone.root/"models"/M).exists() and not list(clone.root.glob(f".runs/{M}/*/*/result.json"))
    client(Server(url, key=KEY, secret=SECRET)).put_object(Bucket="bucket", Key=key, Body=shard.read_bytes())
    clone.here(monkeypatch, url)
    assert train_here(clone) == train_here(origin, seed=5)


def test_wrong_credentials_are_an_error(bare, far, monkeypatch):
    bare.here(monkeypatch, far[1], secret="wrong")
    with pytest.raises(ShardError, match="data/shards/train/shard-000000.tar: not found here, and DVC cannot read the remote: .*; "
                                         "check the credentials"):
        train_here(bare)
    assert not (bare.root/"models"/M).exists()


def test_broken_connections_do_not_change_the_result(origin, bare, far, monkeypatch):
    "With its own seed: with the parameters of `origin`, DVC has a finished run and nothing would be streamed."
    with bad_line(far[1], Faults(every=150_000, seed=1)) as line:
        bare.here(monkeypatch, line.url)
        assert train_here(bare, seed=6) == train_here(origin, seed=6)
        assert bare.cached() == digests(origin, "train", "dev")
        assert line.cuts.value > 3


def test_training_resumes_after_a_server_outage(origin, bare, far, tmp_path, monkeypatch):
    "An outage during a run: an error after 8 attempts; the same command resumes later, with the result of an uninterrupted run."
    windows = dict(asdict(config(bare, TrainConfig, "train")), shuffle_buffer=10, checkpoint_minutes=1e-9)
    monkeypatch.setattr(ai2text.data.storage, "LONGEST_WAIT", 0.05)
    # for two shards, so that the server is always needed
    monkeypatch.setattr(ai2text.data.loader, "Cache",
                        lambda: Cache(gb=2.5*max(s["bytes"] for s in load_index(Layout(bare.root).split_index("train")).shards)/1e9))
    class StopServer:
        def on_step(self, trainer):
            if trainer.state.step == 2: server.close()
    def run(w, folder, *observers):
        train_rank(Ranks(), M, windows, [], str(w.root), str(folder), observers=observers)
        return result(w, folder/"learning_curve.csv")[0]
    server = contextlib.ExitStack()
    bare.here(monkeypatch, server.enter_context(serve_s3(far[0])))
    with pytest.raises(ShardError, match=r"s3://bucket/dvc/files/md5/../\w+: connection lost at byte \d+, after 8 attempts"):
        run(bare, tmp_path/"run", StopServer())
    assert not (tmp_path/"run/result.json").exists()
    bare.here(monkeypatch, far[1])
    assert run(bare, tmp_path/"run") == run(origin, tmp_path/"expected")
    attempts = [json.loads(line) for line in (tmp_path/"run/ttq_log.jsonl").read_text().splitlines()]
    assert [e["step"] > 0 for e in attempts if e["kind"] == "resume"] == [False, True]
