"""A run in several processes gives the weights of a single process, or all ranks end with one error.

The ranks are real processes, started by torchrun with the functions at the top of this file."""
import csv, os, signal, subprocess, sys, threading, time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from ai2text.training.checkpoint import latest, load_checkpoint
from ai2text.core.files import read_json
from ai2text.core.layout import Layout
from ai2text.core.distributed import WORKER, RankError, launch
from ai2text.core.sections import InitConfig
from ai2text.training.init import init
from ai2text.training import run as training
from ai2text.training.run import fit
from ai2text.core.sections import TrainConfig
from ai2text.testing.workspace import tiny_workspace
from ai2text.training.optimizer import fast_bf16
from ai2text.training.trainer import TrainerOptimized
from ai2text.ttq.log import load_log
from conftest import too

# Functions of the ranks

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 300), nn.Tanh(), nn.Linear(300, 1))

def compare_with_ddp(ranks):
    "The gradients of a window of two micro-batches equal those of DistributedDataParallel."
    draw = torch.Generator().manual_seed(ranks.rank)
    window, (ours, theirs) = [torch.randn(3, 8, generator=draw) for _ in range(2)], (net() for _ in range(2))
    for x in window: ours(x).square().sum().backward()
    wrapped = nn.parallel.DistributedDataParallel(theirs)
    with wrapped.no_sync(): wrapped(window[0]).square().sum().backward()
    wrapped(window[1]).square().sum().backward()
    for a,b in zip(ranks.sum_gradients(list(ours.parameters())), theirs.parameters()):
        torch.testing.assert_close(a, ranks.world*b.grad, rtol=1e-5, atol=1e-6)
    if ranks.main: print("equal to DDP in 2 ranks", ranks.world == 2)

def fails(ranks):
    "One rank raises, the other waits for it."
    if ranks.rank == 1: raise ValueError("lr = -1: give a positive one")
    ranks.any(False)

def dies(ranks):
    if ranks.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    ranks.any(False)

def waits(ranks, folder):
    "Write the pids of all ranks and wait for a signal."
    pids = ranks.gather(os.getpid())
    if ranks.main: Path(folder, "pids").write_text(" ".join(map(str, pids)))
    while True: time.sleep(0.05)

def slowly(ranks, **run):
    "`train_rank`, slowed down, so that it can be interrupted."
    make_step = TrainerOptimized.train_step
    def train_step(self, *arguments): time.sleep(0.2); return make_step(self, *arguments)
    TrainerOptimized.train_step = train_step
    training.train_rank(ranks, **run)

# Tests

@pytest.fixture(autouse=True)
def importable(monkeypatch):
    "The ranks can import this file and the tested package."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))

def here(function): return f"{Path(__file__).stem}:{function.__name__}"

def wait_for(holds, seconds=300):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.05)

def alive(pid): return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

@pytest.mark.slow
def test_gradients_are_those_of_ddp(capfd):
    launch(here(compare_with_ddp), {}, 2, threads=1)
    assert capfd.readouterr().err == "equal to DDP in 2 ranks True\n"

@pytest.mark.slow
@pytest.mark.parametrize("function, message",
                         [(fails, "rank 1 of 2: ValueError: lr = -1: give a positive one"),
                          (dies, "rank 1 of 2: was killed, perhaps out of memory")])
def test_all_ranks_end_when_one_fails(function, message):
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RankError, match=message): launch(here(function), {}, 2, threads=1)
    assert not set(psutil.Process().children(recursive=True)) - before

@pytest.mark.slow
@pytest.mark.parametrize("how, code", [(signal.SIGTERM, 3), (signal.SIGKILL, -signal.SIGKILL)])
def test_ranks_end_with_their_parent(tmp_path, how, code):
    "SIGTERM is passed on to the ranks; a killed parent leaves no orphans."
    script = f"""
import sys
from ai2text.core.distributed import launch
try: launch({here(waits)!r}, dict(folder={str(tmp_path)!r}), 2, threads=1)
except KeyboardInterrupt as e: print(e); sys.exit(3)"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path/"pids").exists() and len((tmp_path/"pids").read_text().split()) == 2)
    pids = [int(pid) for pid in (tmp_path/"pids").read_text().split()]
    assert all(map(alive, pids))
    process.send_signal(how)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code and output == ("SIGTERM before the first step\n" if code == 3 else "")
    wait_for(lambda: not any(map(alive, pids)), 60)

# Training

TRAIN = dict(max_steps=16, batch_seconds=20., optimizer="adamw", lr=1e-3, warmup_steps=0, evaluate_every_steps=4, checkpoint_minutes=1e-4,
             amp_dtype="fp32", threads=1)

@pytest.fixture(scope="module")
def layout():
    return Layout(tiny_workspace("shards"))

def run(layout, name, **changes):
    "Train a tiny model; returns its final weights, its curve without times, and its folder."
    init(name, InitConfig(), dict(family="conformer", size="tiny", freq_masks=0, time_masks=0), layout)
    folder = fit(name, TrainConfig(**TRAIN | changes), [dict(wer=0.3, budget_hours=1)], layout)
    rows = list(csv.DictReader(open(folder/"learning_curve.csv")))
    curve = [{k: float(v) for k,v in row.items() if k != "hours"} for row in rows]
    return load_checkpoint(latest(folder/"checkpoints"))[0]["model"], curve, folder

@pytest.fixture(scope="module")
def whole(layout): return run(layout, "whole", nproc=2)

@pytest.mark.parametrize("world", [2, *too(3)])
def test_several_ranks_equal_one_with_more_accumulation_steps(layout, whole, world):
    a, curve_a, _ = run(layout, "one", accumulation_steps=world)
    b, curve_b, folder = whole if world == 2 else run(layout, "three", nproc=3)
    for name in a: torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5)
    for x,y in zip(curve_a, curve_b, strict=True): assert x == pytest.approx(y, rel=1e-4)
    assert load_log(folder/"ttq_log.jsonl")["about"]["processes"] == world

@pytest.mark.skipif(not fast_bf16(torch.device("cpu")), reason="no bfloat16 instructions")
def test_two_ranks_measure_their_precision_together(layout):
    "`auto` times the first micro-batch in both types; a rank that did not would leave the other waiting."
    _, curve, folder = run(layout, "auto", nproc=2, amp_dtype="auto", max_steps=2, evaluate_every_steps=0)
    assert curve[-1]["step"] == 2 and read_json(folder/"result.json")["dtype"] in ("bfloat16", "float32")

def when_saved(folder, steps, act):
    "Call `act` from a thread once a run has a checkpoint at one of these steps."
    def watch():
        saved = lambda: (path := next(iter(folder.glob("*/*/checkpoints")), None)) and latest(path)
        wait_for(lambda: saved() and int(saved().name[5:]) in steps)
        act()
    threading.Thread(target=watch, daemon=True).start()

def ranks_of(process):
    "The rank processes."
    return [p for p in process.children(recursive=True) if p.cmdline()[1:] == ["-c", WORKER]]

@pytest.mark.slow
def test_two_ranks_resume_after_a_stop_and_a_kill_to_the_same_weights(layout, whole, monkeypatch):
    monkeypatch.setattr(training, "launch", lambda function, *arguments: launch(here(slowly), *arguments))
    top, me = layout.runs/"killed", psutil.Process()
    when_saved(top, range(2, 16), lambda: me.send_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match=r"SIGTERM at step \d+; saved as .*, run it again to go on"): run(layout, "killed", nproc=2)
    step = int(latest(next(top.glob("*/*/checkpoints"))).name[5:])
    when_saved(top, range(step + 2, 16), lambda: max(ranks_of(me), key=lambda p: p.pid).kill())
    with pytest.raises(RankError, match=r"rank [01, ]+ of 2: was killed"): run(layout, "killed", nproc=2)
    weights, curve, _ = run(layout, "killed", nproc=2)
    assert all(torch.equal(weights[name], whole[0][name]) for name in weights) and curve == whole[1]
