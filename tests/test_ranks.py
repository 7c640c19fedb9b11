"""Several processes make one run: they end with the weights that one process would have, or they end together and say why.

The processes are real ones, started by torchrun on the functions at the top of this file."""
import csv, os, signal, subprocess, sys, threading, time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from ai2text.training.checkpoint import latest, load_checkpoint
from ai2text.core.layout import Layout
from ai2text.core.distributed import WORKER, RankError, launch
from ai2text.core.sections import InitConfig
from ai2text.training.init import init
from ai2text.training import run as training
from ai2text.training.run import fit
from ai2text.core.sections import TrainConfig
from ai2text.testing.workspace import tiny_workspace
from ai2text.training.trainer import TrainerOptimized
from ai2text.ttq.log import load_log
from conftest import too

# What runs in a rank

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 300), nn.Tanh(), nn.Linear(300, 1))

def as_ddp_does(ranks):
    "Gradients of a window of two micro-batches, ours and those of DistributedDataParallel."
    draw = torch.Generator().manual_seed(ranks.rank)
    window, (ours, theirs) = [torch.randn(3, 8, generator=draw) for _ in range(2)], (net() for _ in range(2))
    for x in window: ours(x).square().sum().backward()
    wrapped = nn.parallel.DistributedDataParallel(theirs)
    with wrapped.no_sync(): wrapped(window[0]).square().sum().backward()
    wrapped(window[1]).square().sum().backward()
    for a,b in zip(ranks.sum_gradients(list(ours.parameters())), theirs.parameters()):
        torch.testing.assert_close(a, ranks.world*b.grad, rtol=1e-5, atol=1e-6)
    if ranks.main: print("as DDP does, in 2 ranks", ranks.world == 2)

def fails(ranks):
    "One rank has an error, the other waits for it."
    if ranks.rank == 1: raise ValueError("lr = -1: give a positive one")
    ranks.any(False)

def dies(ranks):
    if ranks.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    ranks.any(False)

def waits(ranks, folder):
    "Says who it is, and does nothing until it is told to."
    pids = ranks.gather(os.getpid())
    if ranks.main: Path(folder, "pids").write_text(" ".join(map(str, pids)))
    while True: time.sleep(0.05)

def slowly(ranks, **run):
    "The project's own training, slowly, so that it is met on its way."
    make_step = TrainerOptimized.train_step
    def train_step(self, *arguments): time.sleep(0.2); return make_step(self, *arguments)
    TrainerOptimized.train_step = train_step
    training.train_rank(ranks, **run)

# What is expected of them

@pytest.fixture(autouse=True)
def importable(monkeypatch):
    "The ranks find this file, and the package that is tested."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))

def here(function): return f"{Path(__file__).stem}:{function.__name__}"

def wait_for(holds, seconds=300):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)

def alive(pid): return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

@pytest.mark.slow
def test_gradients_are_those_of_ddp(capfd):
    launch(here(as_ddp_does), {}, 2, threads=1)
    assert capfd.readouterr().err == "as DDP does, in 2 ranks True\n"

@pytest.mark.slow
@pytest.mark.parametrize("function, says", [(fails, "rank 1 of 2: ValueError: lr = -1: give a positive one"), (dies, "rank 1 of 2: was killed, perhaps for want of memory")])
def test_the_end_of_one_is_the_end_of_all(function, says):
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RankError, match=says): launch(here(function), {}, 2, threads=1)
    assert not set(psutil.Process().children(recursive=True)) - before

@pytest.mark.slow
@pytest.mark.parametrize("how, code", [(signal.SIGTERM, 3), (signal.SIGKILL, -signal.SIGKILL)])
def test_they_end_with_who_started_them(tmp_path, how, code):
    "Asked to stop, they are asked too; killed, they are no orphans."
    script = f"import sys\nfrom ai2text.core.distributed import launch\ntry: launch({here(waits)!r}, dict(folder={str(tmp_path)!r}), 2, threads=1)\nexcept KeyboardInterrupt as e: print(e); sys.exit(3)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path/"pids").exists() and len((tmp_path/"pids").read_text().split()) == 2)
    pids = [int(pid) for pid in (tmp_path/"pids").read_text().split()]
    assert all(map(alive, pids))
    process.send_signal(how)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == code and said == ("SIGTERM before the first step\n" if code == 3 else "")
    wait_for(lambda: not any(map(alive, pids)), 60)

# The project's own training

TRAIN = dict(max_steps=16, batch_seconds=20., optimizer="adamw", lr=1e-3, warmup_steps=0, evaluate_every_steps=4, checkpoint_minutes=1e-4, amp_dtype="fp32", threads=1)

@pytest.fixture(scope="module")
def layout():
    return Layout(tiny_workspace("shards"))

def run(layout, name, **changes):
    "Train a tiny model; its last weights, and the rows of its curve without clocks."
    init(name, InitConfig(), dict(family="conformer", size="tiny", freq_masks=0, time_masks=0), layout)
    folder = fit(name, TrainConfig(**TRAIN | changes), [dict(wer=0.3, budget_hours=1)], layout)
    rows = list(csv.DictReader(open(folder/"learning_curve.csv")))
    return load_checkpoint(latest(folder/"checkpoints"))[0]["model"], [{k: float(v) for k,v in row.items() if k != "hours"} for row in rows], folder

@pytest.fixture(scope="module")
def whole(layout): return run(layout, "whole", nproc=2)

@pytest.mark.parametrize("world", [2, *too(3)])
def test_ranks_are_one_with_more_accumulation(layout, whole, world):
    (a, curve_a, _), (b, curve_b, folder) = run(layout, "one", accumulation_steps=world), whole if world == 2 else run(layout, "three", nproc=3)
    for name in a: torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5)
    for x,y in zip(curve_a, curve_b, strict=True): assert x == pytest.approx(y, rel=1e-4)
    assert load_log(folder/"ttq_log.jsonl")["about"]["processes"] == world

def when_saved(folder, steps, act):
    "Do something as soon as a run has saved itself at one of these steps, from another thread."
    def watch():
        saved = lambda: (path := next(iter(folder.glob("*/*/checkpoints")), None)) and latest(path)
        wait_for(lambda: saved() and int(saved().name[5:]) in steps)
        act()
    threading.Thread(target=watch, daemon=True).start()

def ranks_of(process):
    "The processes that train."
    return [p for p in process.children(recursive=True) if p.cmdline()[1:] == ["-c", WORKER]]

@pytest.mark.slow
def test_asked_to_stop_then_killed_two_ranks_end_as_if_left_alone(layout, whole, monkeypatch):
    monkeypatch.setattr(training, "launch", lambda function, *arguments: launch(here(slowly), *arguments))
    top, me = layout.runs/"killed", psutil.Process()
    when_saved(top, range(2, 16), lambda: me.send_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match=r"SIGTERM at step \d+; saved as .*, run it again to go on"): run(layout, "killed", nproc=2)
    step = int(latest(next(top.glob("*/*/checkpoints"))).name[5:])
    when_saved(top, range(step + 2, 16), lambda: max(ranks_of(me), key=lambda p: p.pid).kill())
    with pytest.raises(RankError, match=r"rank [01, ]+ of 2: was killed"): run(layout, "killed", nproc=2)
    weights, curve, _ = run(layout, "killed", nproc=2)
    assert all(torch.equal(weights[name], whole[0][name]) for name in weights) and curve == whole[1]
