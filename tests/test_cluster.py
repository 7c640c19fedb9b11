"""A run on two machines with separate working trees, the second streaming its shards from S3; either may be killed and restarted.

The machines are process trees on this one, started by `fit` and `join`; the utterances of each step are recorded."""
import csv, json, os, shutil, signal, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from ai2text.training.checkpoint import latest, load_checkpoint
from ai2text.core.files import read_jsonl
from ai2text.core.layout import Layout
from ai2text.core.params import load_params, make
from ai2text.testing.s3_faults import KEY, SECRET, serve_s3
from ai2text.core.distributed import launch
from ai2text.core.sections import InitConfig
from ai2text.training.init import init
from ai2text.training import run
from ai2text.training.run import fit, join
from ai2text.core.sections import TrainConfig
from ai2text.data.shard_index import load_index
from ai2text.testing.workspace import tiny_workspace
from ai2text.training.trainer import TrainerOptimized
from conftest import free_port

pytestmark = pytest.mark.slow
STEPS, MILESTONES = 40, [dict(wer=0.3, budget_hours=1)]

# A machine

def recording(ranks, **what):
    "`train_rank`, slowed down, recording the utterances of each step in its own tree; a repeated step replaces the first."
    make_step = TrainerOptimized.train_step
    def train_step(self, window, used=0.):
        time.sleep(0.1)
        result = make_step(self, window, used)
        with open(Path(what["root"], "seen.jsonl"), "a") as f:
            f.write(json.dumps(dict(step=self.state.step, parts=[[b.epoch, b.ids] for b in window])) + "\n")
        return result
    TrainerOptimized.train_step = train_step
    run.train_rank(ranks, **what)

def machine(number, root):
    "One machine: `dvc repro` runs `fit`, `ai2text join` runs `join`. It ends when the test process does."
    def end_with_parent():
        sys.stdin.read()
        os.killpg(0, signal.SIGKILL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    run.launch = lambda function, *arguments: launch("test_cluster:recording", *arguments)
    if number: print(join("m", number, Path(root)))
    else: fit("m", config_of(root), MILESTONES, Layout(root))

def config_of(root): return make(TrainConfig, load_params(Path(root, "params.yaml"))["train"], "train")

class Machine:
    "The processes of a machine, and their output."
    def __init__(self, number, root):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
               "XDG_CACHE_HOME": f"{root}/cache", "CUDA_VISIBLE_DEVICES": ""}
        self.root, self.log = root, open(root/f"output-{time.monotonic_ns()}", "w+")
        self.process = subprocess.Popen([sys.executable, "-c", f"from test_cluster import machine; machine({number}, {str(root)!r})"],
                                        stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, env=env, start_new_session=True)

    def kill(self):
        "Kill the whole process tree."
        try: tree = [top := psutil.Process(self.process.pid), *top.children(recursive=True)]
        except psutil.NoSuchProcess: return
        for p in tree:
            try: p.kill()
            except psutil.NoSuchProcess: pass
        psutil.wait_procs(tree, 10)
        self.process.wait()

    def end(self, seconds=300): return self.process.wait(seconds), self.output

    @property
    def output(self): return Path(self.log.name).read_text()

    def __enter__(self): return self
    def __exit__(self, *_):
        self.kill()
        self.process.stdin.close()
        self.log.close()

def wait_for(holds, *machines, seconds=300):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "timeout: " + "\n".join(m.output for m in machines)
        time.sleep(0.02)

# Working trees

@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    "Two clones of a project on one S3 server; the second has all but the shards."
    from dvc.repo import Repo
    top = tmp_path_factory.mktemp("cluster")
    (top/"store/bucket").mkdir(parents=True)
    one, two = top/"one", top/"two"
    shutil.copytree(tiny_workspace("shards"), one)
    init("m", InitConfig(), dict(family="conformer", size="tiny", freq_masks=0, time_masks=0), Layout(one))
    (one/"dvc.yaml").write_text("stages: {}\n")
    (one/"params.yaml").write_text(json.dumps(dict(models=dict(m=dict(family="conformer")),
                                                   train=dict(machines=2, master=f"127.0.0.1:{free_port()}", max_steps=STEPS,
                                                              batch_seconds=20., optimizer="adamw", lr=1e-3,
        warmup_steps=0, ema_decay=0.9, evaluate_every_steps=15, checkpoint_minutes=1e-4, amp_dtype="fp32", threads=1))))
    def git(*arguments): subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *map(str, arguments)], cwd=one,
                                        check=True, capture_output=True)
    with serve_s3(top/"store") as url:
        keys = f"['remote \"far\"']\n    access_key_id = {KEY}\n    secret_access_key = {SECRET}\n"
        git("init", "-q")
        with Repo.init(str(one)) as repo:
            (one/".dvc/config").write_text(f"[core]\n    remote = far\n    analytics = false\n['remote \"far\"']\n    url = "
                                           f"s3://bucket/dvc\n    endpointurl = {url}\n")
            (one/".dvc/config.local").write_text(keys)
        with Repo(str(one)) as repo:
            repo.add([str(one/path) for path in ("data/shards", "data/index", "data/prepared", "models/init")])
            repo.push()
        git("add", "dvc.yaml", "params.yaml", ".dvc", ".dvcignore", *sorted(p.relative_to(one) for p in one.rglob("*.dvc") if p.is_file()))
        git("commit", "-qm", "one")
        git("clone", "-q", one, two)
        (two/".dvc/config.local").write_text(keys)
        with Repo(str(two)) as repo: repo.pull([str(two/path) for path in ("data/index", "data/prepared", "models/init")])
        assert not (two/"data/shards").exists() and not (two/"data/corpus").exists()
        yield one, two

def outcome(folder):
    "Final weights and averages, utterances, and the curve without times."
    weights, state = load_checkpoint(latest(folder/"checkpoints"))
    rows = list(csv.DictReader(open(folder/"learning_curve.csv")))
    curve = [{k: v for k,v in row.items() if k != "hours"} for row in rows]
    return weights["model"] | {f"ema.{k}": v for k,v in weights["ema"].items()}, state["run"]["units"], curve

@pytest.fixture(scope="module")
def whole(trees):
    "The result of two processes on one machine."
    config = config_of(trees[0])
    config.machines, config.nproc = 1, 2
    return outcome(fit("m", config, MILESTONES, Layout(trees[0])))

# Tests

def run_of(root):
    "The folder of the run of two machines: the newest one."
    return max((root/".runs/m").glob(f"*/{STEPS}-steps"), key=lambda p: p.stat().st_mtime_ns, default=None)

def step_of(folder): return int(path.name[5:]) if folder and (path := latest(folder/"checkpoints")) else 0

def test_two_machines_give_the_weights_of_two_processes_also_after_kills(trees, whole):
    one, two = trees
    known = run_of(one)
    def step(): return 0 if (folder := run_of(one)) == known else step_of(folder)
    params = (two/"params.yaml").read_text()
    with Machine(0, one) as first:
        (two/"params.yaml").write_text(params.replace('"lr": 0.001', '"lr": 0.5'))
        with Machine(1, two) as other: code, output = other.end()
        differs = "machine 1 of 2: differs from the first machine: train.lr (0.5, on the first machine 0.001)"
        error = f"RankError: rank 0 of 1: ConfigError: {differs}. Check out the first machine's commit here, run `dvc pull`"
        assert code == 1 and error in output
        wait_for(lambda: differs in first.output, first)
        assert "waiting for machine 1 (start it with: ai2text join m --machine 1)" in first.output
        assert first.process.poll() is None and not step()
        (two/"params.yaml").write_text(params)
        with Machine(1, two) as second: # killed and restarted
            wait_for(lambda: step() >= 3, first, second)
            second.kill()
        reached = step()
        assert reached < STEPS
        with Machine(1, two) as second:
            wait_for(lambda: step() >= reached + 3, first, second)
            first.kill()
            reached = step()
            assert reached < STEPS and "goes on from the last checkpoint" in first.output
            with Machine(0, one) as first:
                assert first.end()[0] == 0, first.output
                code, output = second.end()
    assert code == 0 and output.endswith("machine 1 of 2: the run is finished, its results are on "
                                         "the first machine\n") and "goes on from the last checkpoint" in output
    weights, units, curve = outcome(run_of(one))
    assert all(torch.equal(weights[name], whole[0][name]) for name in weights) and (units, curve) == whole[1:]
    assert not (two/".runs").exists() and not (two/"data/shards").exists()
    shards = sum(len(load_index(Layout(two).split_index(s)).shards) for s in ("train", "dev"))
    assert len(list((two/"cache/ai2text/shards").glob("[0-9a-f]*"))) == shards
    seen = [{row["step"]: row["parts"] for row in read_jsonl(root/"seen.jsonl")} for root in trees]
    assert all(list(sorted(part)) == list(range(1, STEPS + 1)) for part in seen)
    epochs = {}
    for epoch, ids in (p for part in seen for step in part.values() for p in step): epochs.setdefault(epoch, Counter()).update(ids)
    everyone = Counter(row["id"] for row in read_jsonl(Layout(one).manifest("train")))
    assert len(epochs) > 2 and all(epochs[e] == everyone for e in sorted(epochs)[:-1]) and units == sum(map(Counter.total, epochs.values()))
