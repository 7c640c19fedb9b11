"Shards from a Dask cluster whose workers have their own working trees, with recordings pulled by DVC from a real S3 server."
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import soundfile as sf
from distributed import Client

from ai2text.core.files import read_jsonl, sha256, write_jsonl
from ai2text.core.params import ConfigError
from ai2text.testing.s3_faults import KEY, SECRET, serve_s3
from ai2text.data.shard_index import ShardError, load_index
from ai2text.core.sections import ShardsConfig
from ai2text.data.shards import create_shards, safe_key, verify, write_shards
from conftest import ROOT, free_port
from workspace import Workspace, environment

pytestmark = pytest.mark.slow
SIZES = dict(train=60, dev=9, test=9)
OPTIONS = dict(shard_size=5, codec="flac")
RUN = (sys.executable, "-m", "ai2text.pipeline.cli")


def record(tree:Path):
    "The outputs of `corpus` and `prepare`: recordings at 44.1 kHz, and manifests."
    draw = np.random.default_rng(0)
    wav = tree/"data/corpus/demo/wav"
    wav.mkdir(parents=True)
    for split, size in SIZES.items():
        rows = []
        for i in range(size):
            path = wav/f"{split}{i}.wav"
            sf.write(path, np.int16(draw.standard_normal(44_100*3 + 100*i).cumsum().clip(-99, 99)*300), 44_100)
            rows.append(dict(id=f"demo-{split}.{i}", audio_filepath=f"../corpus/demo/wav/{path.name}", duration=sf.info(path).duration,
                             sample_rate=44_100, text=f"câu số {i}",
                             text_raw=f"Câu số {i}.", speaker="s", split=split, corpus="demo", sha256=sha256(path),
                             bytes=path.stat().st_size))
        write_jsonl(tree/f"data/prepared/{split}.jsonl", rows)
    for name in ("corpus-demo", "prepare"): shutil.copy(ROOT/"nbs/stages/corpus.ipynb", tree/f"papermill_runs/{name}.ipynb")


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    "The working tree of the run, and two clones with recordings pulled from S3."
    home = tmp_path_factory.mktemp("cluster")
    (home/"store/bucket").mkdir(parents=True)
    run = Workspace(home/"run")
    (run.root/"papermill_runs").mkdir(exist_ok=True)
    run.change(dict(shards=OPTIONS))
    record(run.root)
    with serve_s3(home/"store") as url:
        keys = dict(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
        (run.root/".dvc/config").write_text(f"[core]\n    remote = far\n['remote \"far\"']\n    url = s3://bucket/dvc\n    "
                                            f"endpointurl = {url}\n")
        run.run("dvc", "commit", "-f", "corpus@demo", "prepare")
        run.run("git", "add", "-A")
        run.run("git", "-c", "user.name=n", "-c", "user.email=e@x.invalid", "commit", "-q", "-m", "recordings")
        run.run("dvc", "push", "corpus@demo", "prepare", **keys)
        run.run("git", "clone", "-q", str(run.root), str(home/"b"))
        subprocess.run(["dvc", "pull", "corpus@demo", "prepare"], cwd=home/"b", env=environment(**keys), check=True, capture_output=True)
    shutil.copytree(home/"b", home/"c")
    return run, dict(b=home/"b", c=home/"c")


def start(*command, cwd):
    return subprocess.Popen([sys.executable, "-m", *command], cwd=cwd, env=environment(PYTHONPATH=None), stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def cluster(trees):
    "A scheduler and a worker in each clone; `worker(name)` restarts one."
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    def worker(name):
        started[name] = start("distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard",
                              "--no-nanny", "--name", name,
                              "--local-directory", str(trees[0].root.parent/"dask"), cwd=trees[1][name])
    started = dict(scheduler=start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard",
                                   cwd=trees[1]["b"]))
    try:
        for name in trees[1]: worker(name)
        with Client(address, timeout=200, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=200)
            yield SimpleNamespace(address=address, client=client, started=started, worker=worker)
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def digests(folder): return {p.name: sha256(p) for p in folder.iterdir()}


def until(condition, run, seconds=300.):
    "Wait for a condition while a run continues."
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, "the run finished first"
        assert time.monotonic() < end, "timeout"
        time.sleep(0.03)


def test_shards_are_complete_after_a_worker_is_killed_and_restarted(trees, cluster, tmp_path):
    "Every utterance occurs once, and the bytes are those of one process."
    run, clones = trees
    def workers(): return {about["name"]: address for address, about in cluster.client.scheduler_info(n_workers=-1)["workers"].items()}
    def busy(name): return cluster.client.processing().get(workers().get(name))
    run.change(dict(shards=dict(scheduler=cluster.address)))
    with subprocess.Popen([*RUN, "stage", "shards"], cwd=run.root, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as process:
        until(lambda: busy("c"), process)
        before = workers()["c"]
        cluster.started["c"].kill()
        # or the other worker could finish all shards
        paused = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for p in paused: p.suspend()
        try:
            assert len(list((run.root/"data/shards/train").glob("shard-*.tar"))) < SIZES["train"]//OPTIONS["shard_size"], (
                "all shards were done before the worker was killed")
            assert cluster.started["c"].wait() == -signal.SIGKILL
            cluster.worker("c")
            until(lambda: workers().get("c", before) != before, process)
        finally:
            for p in paused: p.resume()
        until(lambda: busy("c"), process)
        output = process.communicate()[0]
    assert process.returncode == 0, output[-3000:]
    for split, size in SIZES.items():
        rows, index = read_jsonl(run.root/f"data/prepared/{split}.jsonl"), load_index(run.root/f"data/index/{split}.json")
        assert sorted(index.key) == sorted(safe_key(r["id"]) for r in rows) and len(index) == size and not index.rejected
        assert verify(run.root/f"data/shards/{split}", index) == []
        write_shards(rows, tmp_path/split, tmp_path/f"{split}.json", ShardsConfig(processes=1, **OPTIONS),
                     audio_root=run.root/"data/prepared")
        assert digests(run.root/"data/shards"/split) == digests(tmp_path/split)
        assert sha256(run.root/f"data/index/{split}.json") == sha256(tmp_path/f"{split}.json")
    run.run(*RUN, "verify", "data/shards/train", "--index", "data/index/train.json")
    assert not any((clone/"data/shards").exists() for clone in clones.values()), "a worker wrote shards into its own tree"


@pytest.mark.parametrize("corrupt, message", [
    (lambda path: path.unlink(), "no such recording; start workers in the project's folder"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "bytes that differ from the manifest; check out the commit")],
    ids=["none", "another"])
def test_a_worker_with_other_recordings_is_an_error(corrupt, message, trees, cluster, tmp_path, monkeypatch):
    "The error names worker, folder, file and fix; nothing is rejected or written."
    run, clones = trees
    monkeypatch.chdir(run.root)
    rows = read_jsonl("data/prepared/dev.jsonl")
    for clone in clones.values():
        (path := clone/"data/corpus/demo/wav/dev4.wav").with_suffix(".kept").write_bytes(path.read_bytes())
        path.chmod(0o644)
        corrupt(path)
    try:
        with pytest.raises(ShardError, match="worker on .*/[bc]: data/corpus/demo/wav/dev4.wav: ") as e:
            write_shards(rows, tmp_path/"out", tmp_path/"out.json", ShardsConfig(scheduler=cluster.address, **OPTIONS),
                         audio_root="data/prepared")
        assert message in str(e.value) and not (tmp_path/"out.json").exists()
    finally:
        for clone in clones.values(): (path := clone/"data/corpus/demo/wav/dev4.wav").with_suffix(".kept").replace(path)


def test_a_relative_folder_is_that_of_each_worker(trees, cluster, tmp_path, monkeypatch):
    "Recordings of all workers must be equal."
    monkeypatch.chdir(trees[0].root)
    (tmp_path/"t.json").write_text(json.dumps({f"dev{i}": f"câu {i}" for i in range(9)}))
    for name, how in dict(far=dict(scheduler=cluster.address), near=dict(processes=1)).items():
        create_shards("data/corpus/demo/wav", tmp_path/"t.json", tmp_path/name, shard_size=3, **how)
    assert digests(tmp_path/"far") == digests(tmp_path/"near") and len(digests(tmp_path/"far")) == 5 # shards, index and normaliser


def test_an_unreachable_scheduler_is_an_error():
    with pytest.raises(ConfigError, match="scheduler nowhere: does not answer"):
        write_shards([dict(id="a", audio_filepath="a.wav", text="a")], "out", "out.json", ShardsConfig(scheduler="nowhere"), audio_root=".")
