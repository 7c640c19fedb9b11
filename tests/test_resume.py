"""A run that is killed at random moments, or stopped, ends bit for bit like an uninterrupted one.

The trainers are real processes, forked from one that has imported torch, since the import takes longer than the run."""
import csv, math, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from torch import nn

from ai2text.core.batch import Loss, collate
from ai2text.training.budget import Budget, Every, WarmupConstantDecay
from ai2text.training.checkpoint import latest, load_checkpoint
from ai2text.ttq.stopping import StopWhen
from ai2text.training.trainer import Interrupted, TrainerOptimized
from ai2text.ttq.log import TTQObserver, TTQTracker, load_log
from conftest import too

STEPS, KILLS = 60, 25

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 1))

    def forward(self, batch):
        guess = self.net(batch.audio)[:,0].float()
        return Loss((guess - batch.audio.square().sum(1)).square().sum(), torch.tensor(float(len(batch))), {})

class Loader:
    "Twelve uneven batches an epoch, with a state."
    epoch = next = 0

    def __iter__(self):
        while self.next < 12:
            i, self.next = self.next, self.next + 1
            draw = torch.Generator().manual_seed(1000*self.epoch + i)
            waves = [torch.rand(16, generator=draw).numpy() for _ in range(2 + i%3)]
            yield collate(waves, ["a"]*len(waves), [f"{i}-{j}" for j in range(len(waves))], self.epoch, i)
        self.epoch, self.next = self.epoch + 1, 0

    def state_dict(self): return dict(epoch=self.epoch, next=self.next)
    def load_state_dict(self, state): self.epoch, self.next = state["epoch"], state["next"]

def measure(model):
    draw = torch.Generator().manual_seed(7)
    return dict(val_wer=float(model(collate([torch.rand(16, generator=draw).numpy() for _ in range(8)], ["a"]*8, ["a"]*8)).sum))

def train(folder, dtype="fp32", pause=0., observers=(), wer=None, every=7, go_on=False):
    "The run under test, with everything that a checkpoint must hold. `wer(step)` replaces the measurement."
    torch.manual_seed(0)
    model = Model()
    trainer = TrainerOptimized(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), None, 4, 5, amp_dtype=dtype,
        schedule=WarmupConstantDecay(5), ema_decay=0.9, seed=3, device="cpu", threads=1
    )
    if trainer.scaler.is_enabled(): trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.**24, growth_interval=7)
    class Slow(Loader):
        def __iter__(self):
            for batch in super().__iter__(): time.sleep(pause); yield batch
    evaluate = (lambda model: dict(val_wer=wer(trainer.state.step))) if wer else measure
    return trainer.fit(Slow(), Budget(STEPS), observers, folder, evaluate=evaluate, evaluate_every=Every(steps=every),
                       checkpoint_every=Every(steps=3), go_on=go_on)

def fork(folder, dtype)->int:
    "Train in a child process."
    if child := os.fork(): return child
    try: train(folder, dtype); os._exit(0)
    except BaseException as e: print(repr(e), file=sys.stderr, flush=True); os._exit(1)

def kill_at_random(top, dtype):
    "One uninterrupted run, and one killed repeatedly."
    warm = nn.Parameter(torch.zeros(1))
    warm.grad = torch.zeros(1)
    torch.optim.AdamW([warm]).step() # its first call imports for a second; no backward here, autograd's threads do not survive a fork
    began = time.monotonic()
    assert os.waitpid(fork(top/"whole", dtype), 0)[1] == 0
    took, draw, kills = time.monotonic() - began, random.Random(0), 0
    while kills < 5: # too few kills on a machine that became faster: again, with shorter attempts
        shutil.rmtree(top/"killed", ignore_errors=True)
        kills = 0
        while not (top/"killed/result.json").exists():
            child = fork(top/"killed", dtype)
            if kills < KILLS:
                time.sleep(draw.uniform(0, 0.25*took))
                os.kill(child, signal.SIGKILL)
                kills += 1
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL), status
        took /= 2

def same_end(a:Path, b:Path):
    "Weights, averages, optimizer and curve are equal, except for times."
    def ends(folder):
        path = latest(folder/"checkpoints")
        rows = [{k: v for k,v in row.items() if k != "hours"} for row in csv.DictReader(open(folder/"learning_curve.csv"))]
        state = load_checkpoint(path)[1]
        moments = [v.tolist() for s in state["optimizer"]["state"].values() for v in s.values()]
        weights = [(path/f"{name}.safetensors").read_bytes() for name in ("model", "ema")]
        return path.name, weights, rows, moments, state["scaler"], state["run"]["loader"]
    for x,y in zip(ends(a), ends(b)): assert x == y
    assert not list((b/"checkpoints").glob(".*"))

def start(*args):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

@pytest.mark.parametrize("dtype", ["fp16", *too("fp32")])
def test_a_killed_run_resumes_exactly(tmp_path, dtype):
    err = (p := start("kill", tmp_path, dtype)).communicate(timeout=300)[1]
    assert p.returncode == 0, err
    same_end(tmp_path/"whole", tmp_path/"killed")

def test_a_signal_saves_the_run(tmp_path):
    p = start("train", tmp_path/"run", "fp32", 0.05)
    while not latest(tmp_path/"run/checkpoints") and p.poll() is None: time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    p.send_signal(signal.SIGINT) # a second signal changes nothing
    err = p.communicate(timeout=300)[1]
    path = latest(tmp_path/"run/checkpoints")
    assert p.returncode == 3 and f"saved as {path}, run it again to go on" in err, err
    step = int(path.name[5:])
    assert 3 <= step < STEPS
    seconds = train(tmp_path/"run")["seconds"]
    assert seconds["lost"] < 0.01 # the time was recorded
    train(tmp_path/"whole")
    same_end(tmp_path/"whole", tmp_path/"run")

def test_the_best_weights_are_kept(tmp_path):
    result = train(tmp_path)
    assert math.isclose(result["best"]["value"], min(float(r["val_wer"]) for r in csv.DictReader(open(tmp_path/"learning_curve.csv"))))
    assert (tmp_path/"checkpoints/best/model.safetensors").exists()

class StopAt:
    "Request a stop at a step, and after every resume from there."
    def __init__(self, step): self.step = step
    def on_start(self, trainer): self.on_step(trainer)
    def on_step(self, trainer):
        if trainer.state.step >= self.step: trainer.request_stop("enough")

def test_a_stopped_run_resumes_exactly(tmp_path):
    result = train(tmp_path/"stopped", observers=[StopAt(35)])
    assert (result["stopped"], result["step"]) == ("enough", 35)
    assert train(tmp_path/"stopped") == result, "a stopped run is finished"
    (tmp_path/"stopped/result.json").unlink() # killed just before the end
    assert train(tmp_path/"stopped", observers=[StopAt(35)])["step"] == 35
    train(tmp_path/"whole")
    assert train(tmp_path/"stopped", go_on=True)["stopped"] == ""
    same_end(tmp_path/"whole", tmp_path/"stopped")

def test_best_weights_of_a_later_step_survive_a_kill(tmp_path):
    "The best weights may be of a step after the last checkpoint; the result names the step."
    class Fail:
        def on_evaluate(self, trainer, row):
            if row["step"] == 14: raise ZeroDivisionError
    falling = lambda step: 1/step if step%7 == 0 else 1.
    with pytest.raises(ZeroDivisionError): train(tmp_path, observers=[Fail()], wer=falling)
    result = train(tmp_path, observers=[StopAt(1)], wer=falling)
    assert result["step"] == 12 and result["best"] == dict(step=14, value=1/14)
    assert load_checkpoint(tmp_path/"checkpoints/best")[0]["model"]

@pytest.mark.parametrize("reason, wer, milestone", [
    ("confirmed", lambda step: .9*step**-.6, dict(wer=.15, budget_hours=1)),
    ("missed", lambda step: .9, dict(wer=.15, budget_hours=1e-6)),
    ("hopeless", lambda step: .8*step**-.1, dict(wer=.2, budget_hours=1))])
def test_a_policy_stops_the_run(tmp_path, reason, wer, milestone):
    def watched(when, **more):
        tracker = TTQTracker([milestone], tmp_path/"ttq_log.json", announce=print)
        return train(tmp_path, observers=[TTQObserver(tracker), StopWhen(tracker, when)], wer=wer, every=2, **more)
    result, log = watched([reason]), load_log(tmp_path/"ttq_log.jsonl")
    assert result["stopped"] == log["reason"] == reason and log["finished"]
    assert 1 <= result["step"] < STEPS
    for name in ("best", latest(tmp_path/"checkpoints").name): assert load_checkpoint(tmp_path/"checkpoints"/name)[0]["model"]
    assert int(latest(tmp_path/"checkpoints").name[5:]) == result["step"]
    assert watched([reason]) == result
    (tmp_path/"result.json").unlink()
    assert watched([reason])["step"] <= result["step"] + 1, "killed before the end was written, it stops at once"
    more = watched([], go_on=True)
    assert (more["step"], more["stopped"]) == (STEPS, "") and load_log(tmp_path/"ttq_log.jsonl")["reason"] == "finished"

if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, dtype, *pause = sys.argv[1:]
    if what == "kill": kill_at_random(Path(folder), dtype)
    else:
        try: train(Path(folder), dtype, *map(float, pause))
        except Interrupted as e: print(e, file=sys.stderr); sys.exit(3)
