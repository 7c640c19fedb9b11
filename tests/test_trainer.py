"""The trainer: accumulation, memory, precision, operations of a step, and data-parallel training with failures on one rank.

Ranks are real processes, forked from one that has imported torch, since the import takes longer than their runs."""
import json, math, os, random, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ai2text.core.batch import Batch, Loss, collate
from ai2text.training.budget import Budget, Every, WarmupConstantDecay
from ai2text.training.checkpoint import latest, load_batches, load_checkpoint
from ai2text.models.conformer import Conformer
from ai2text.core.distributed import Ranks
from ai2text.testing.operations import Operations
from ai2text.text.tokenizer import CharTokenizer
from ai2text.training.optimizer import make_optimizer
from ai2text.training.trainer import Interrupted, TrainerOptimized
from conftest import free_port

STEPS, KILLS = 30, 3

# One process

def conformer():
    torch.manual_seed(0)
    return Conformer.from_config(dict(size="tiny", dropout=0., freq_masks=0, time_masks=0), CharTokenizer())

def utterances(n, seed=0):
    "Noise of 0.4 to 1.2 s with transcripts of a few letters."
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6400, 19200, (n,), generator=draw).tolist()
    return [(0.1*torch.randn(length, generator=draw).numpy(), "ma ba"[:1 + i%5].strip(), f"u{i}") for i,length in enumerate(lengths)]

def batches(of, each): return [collate(*zip(*of[i:i+each]), 0, i//each) for i in range(0, len(of), each)]

def gradient(window, **more):
    model = conformer()
    trainer = TrainerOptimized(model, torch.optim.AdamW(model.parameters()), gradient_clip_val=0., amp_dtype="fp32", device="cpu", **more)
    _, totals = trainer.gradient(window)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), totals, trainer

@pytest.mark.parametrize("n, each", [(32, 4), (14, 4), (3, 4)]) # a full window; two shorter last windows
def test_a_window_has_the_gradient_of_one_batch(n, each):
    of = utterances(n)
    many, sums, _ = gradient(batches(of, each))
    one, sum_, _ = gradient(batches(of, n), batch_size=32, accumulation_steps=1)
    assert (many - one).abs().max() < 1e-5*one.abs().max()
    torch.testing.assert_close(sums[[0, 1, -1]], sum_[[0, 1, -1]], rtol=1e-5, atol=0)
    assert sums[1] == n

def test_a_batch_split_for_memory_has_the_same_gradient():
    of = utterances(32)
    def small(model, batch):
        if len(batch) > 5: raise torch.OutOfMemoryError("full")
        return model(batch)
    whole, *_ = gradient(batches(of, 32))
    for more in (dict(), dict(memory_gb=1.)):
        split, _, trainer = gradient(batches(of, 32), criterion=small, **more)
        assert (split - whole).abs().max() < 1e-5*whole.abs().max()
        assert 0 < trainer.state.largest < batches(of, 32)[0].size/5

def test_activation_checkpointing_gives_the_same_gradient():
    of = batches(utterances(8), 4)
    kept, again = gradient(of)[0], gradient(of, checkpointing=True)[0]
    assert (kept - again).abs().max() < 1e-6*kept.abs().max()

def test_float16_scale_recovers_from_overflow():
    model = conformer()
    trainer = TrainerOptimized(model, torch.optim.AdamW(model.parameters(), lr=0.01), None, 4, 2, amp_dtype="fp16", device="cpu")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.**26)
    window = batches(utterances(8), 4)
    rows = [trainer.train_step(window) for _ in range(40)]
    n = trainer.state.overflows
    assert 3 < n < 30 and trainer.scaler.get_scale() == 2.**(26 - n) and trainer.state.skipped == 0
    assert not any(r["ok"] for r in rows[:3]) and all(r["ok"] for r in rows[-10:]) and rows[-1]["loss"] < 0.7*rows[0]["loss"]

def test_the_host_synchronises_once_a_step():
    waits = Counter()
    class Count(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name in {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"}: waits[name] += 1
            return function(*args, **kwargs or {})
    model = Model()
    trainer = TrainerOptimized(
        model, torch.optim.AdamW(model.parameters(), fused=True), None, 4, 5, amp_dtype="fp16", ema_decay=0.9, device="cpu"
    )
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.)
    window = list(Loader())[:3]
    trainer.train_step(window)
    with Count(): assert trainer.train_step(window)["ok"]
    assert waits == dict(tolist=1, __float__=3) # the latter are of the lengths, which stay on the host

def operations(dtype, layers, dynamic_chunk_prob=0.):
    "Number of operations of a training step of a small model, with augmentation and Muon."
    torch.manual_seed(0)
    shape = dict(size="tiny", layers=layers, heads=1, ff=64, warp=0.1, tempo=0.1, dynamic_chunk_prob=dynamic_chunk_prob)
    model = Conformer.from_config(shape, CharTokenizer())
    trainer = TrainerOptimized(model, make_optimizer(model), None, 4, 1, amp_dtype=dtype, ema_decay=0.99, device="cpu")
    batch = collate(*zip(*utterances(4)), 1, 0)
    trainer.train_step([batch])
    with Operations() as made: trainer.train_step([batch])
    return made.counts.total()

@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_operations_of_a_training_step_stay_few(dtype):
    two, three = operations(dtype, 2), operations(dtype, 3)
    assert three - two <= 64, "of a block, forward and backward"
    assert two - 2*(three - two) <= 230, "of features, augmentation, subsampling, loss, optimizer and averaging"
    assert operations(dtype, 2, 1.) - two <= 16, "of a chunk mask"

# Ranks

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, batch):
        guess = self.net(batch.audio)[:,0].float()
        return Loss(
            (guess - batch.audio.square().sum(1)).square().sum(),
            torch.tensor(float(len(batch))),
            dict(long=torch.tensor(float(len(batch) > 2))),
        )


class Loader:
    "Thirteen uneven micro-batches an epoch, the last of one utterance, distributed over ranks like the real loader."
    def __init__(self, rank=0, world=1): self.rank, self.world, self.epoch, self.next = rank, world, 0, 0

    def __iter__(self):
        while self.next < 13:
            start, self.next = self.next, min(13, self.next + self.world)
            yield (
                self.batch(start + self.rank, slice(None))
                if start + self.world <= 13
                else self.batch(start, slice(self.rank, self.rank + 1))
            )
        self.epoch, self.next = self.epoch + 1, 0

    def batch(self, i, part):
        draw = torch.Generator().manual_seed(1000*self.epoch + i)
        waves = [torch.rand(16, generator=draw).numpy() for _ in range(2 + i%3 if i < 12 else 1)][part]
        return collate(waves, ["a"]*len(waves), [f"{self.epoch}-{i}-{j}" for j in range(len(waves))], self.epoch, i)

    def state_dict(self): return dict(epoch=self.epoch, next=self.next)
    def load_state_dict(self, state): self.epoch, self.next = state["epoch"], state["next"]

def measure(model):
    draw = torch.Generator().manual_seed(7)
    return dict(val_wer=float(model(collate([torch.rand(16, generator=draw).numpy() for _ in range(8)], ["a"]*8, ["a"]*8)).sum))

class StopAt:
    def __init__(self, step): self.step = step
    def on_step(self, trainer):
        if trainer.state.step == self.step: trainer.request_stop("enough")

def train(ranks, folder, criterion=None, observers=(), **more):
    "The run under test; four micro-batches a step for any number of ranks."
    model = Model()
    trainer = TrainerOptimized(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), criterion, 4, 4 // ranks.world, amp_dtype="fp32",
        schedule=WarmupConstantDecay(5), ema_decay=0.9, device="cpu", threads=1, max_bad_steps=3, ranks=ranks
    )
    result = trainer.fit(
        Loader(ranks.rank, ranks.world), more.pop("budget", Budget(STEPS)), observers, folder, evaluate=measure,
        evaluate_every=Every(steps=7), checkpoint_every=Every(steps=3),
        **more,
    )
    (folder/f"rank-{ranks.rank}.json").write_text(json.dumps(result, sort_keys=True))

def full(ranks, limit):
    "Out of memory on rank 1."
    def criterion(model, batch):
        if ranks.rank == 1 and len(batch) > limit: raise torch.OutOfMemoryError("full")
        return model(batch)
    return criterion

def wrong(epoch, every):
    "NaN losses in some micro-batches of odd number, which rank 1 has."
    def criterion(model, batch):
        loss = model(batch)
        return loss._replace(sum=loss.sum*math.nan) if batch.epoch >= epoch and batch.number % every == 1 else loss
    return criterion

class Slow:
    def __init__(self, seconds): self.seconds = seconds
    def on_step(self, trainer): time.sleep(self.seconds)

RUNS = dict(
    one=lambda ranks, folder: train(ranks, folder),
    two=lambda ranks, folder: train(ranks, folder),
    killed=lambda ranks, folder: train(ranks, folder, observers=[Slow(0.02)]),
    signalled=lambda ranks, folder: train(ranks, folder, observers=[Slow(0.1)]),
    memory=lambda ranks, folder: train(ranks, folder, full(ranks, 2)),
    skipped=lambda ranks, folder: train(ranks, folder, wrong(1, 13)),
    aborted=lambda ranks, folder: train(ranks, folder, wrong(2, 2)),
    stopped=lambda ranks, folder: train(ranks, folder, observers=[StopAt(11)]),
    hours=lambda ranks, folder: train(ranks, folder, budget=Budget(max_hours=0.5/3600)),
)

def fork(name, top, world):
    "Start the processes of a run."
    port, pids = free_port(), []
    for rank in range(world):
        if pid := os.fork(): pids.append(pid); continue
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                          GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo")
        try:
            with Ranks.here() if world > 1 else Ranks() as ranks: RUNS[name](ranks, top/name)
            os._exit(0)
        except Interrupted as e: print(rank, e, file=sys.stderr); os._exit(3)
        except FloatingPointError as e: print(rank, e, file=sys.stderr); os._exit(4)
        except BaseException as e: print(rank, repr(e), file=sys.stderr); os._exit(1)
    return pids

def codes(pids): return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

def run_all(top):
    "Run all of `RUNS`; write the exit codes of their ranks to `ends.json`."
    warm = nn.Parameter(torch.zeros(1))
    warm.grad = torch.zeros(1)
    torch.optim.AdamW([warm]).step() # its first call imports for a second; no backward here, autograd's threads do not survive a fork
    for name in RUNS: (top/name).mkdir()
    ends, draw = {}, random.Random(0)
    for name in RUNS.keys() - {"killed", "signalled"}:
        ends[name] = codes(fork(name, top, 1 if name == "one" else 2))
    ends["kills"], end = 0, top/"killed/result.json"
    while not end.exists():
        before, pids = latest(top/"killed/checkpoints"), fork("killed", top, 2)
        if ends["kills"] < KILLS:
            began = time.monotonic()
            while latest(top/"killed/checkpoints") == before and not end.exists() and time.monotonic() < began + 60: time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.15))
            for pid in pids: os.kill(pid, signal.SIGKILL)
            ends["kills"] += 1
        codes(pids)
    pids = fork("signalled", top, 2)
    while not latest(top/"signalled/checkpoints"): time.sleep(0.01)
    os.kill(pids[1], signal.SIGTERM)
    ends["signalled"] = codes(pids)
    ends["signalled at"] = latest(top/"signalled/checkpoints").name
    ends["signalled again"] = codes(fork("signalled", top, 2))
    (top/"ends.json").write_text(json.dumps(ends))

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    top = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, __file__, str(top)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return top, json.loads((top/"ends.json").read_text()), done.stderr

def weights(folder): return load_checkpoint(latest(folder/"checkpoints"))

def close(a, b):
    for kind in ("model", "ema"):
        for name,w in weights(a)[0][kind].items(): torch.testing.assert_close(w, weights(b)[0][kind][name], rtol=1e-4, atol=1e-6)

def same(a, b):
    for file in ("model", "ema"):
        assert (latest(a / "checkpoints") / f"{file}.safetensors").read_bytes() == (
            latest(b / "checkpoints") / f"{file}.safetensors"
        ).read_bytes()
    curve = lambda folder: [{k: v for k,v in row.items() if k != "hours"} for row in weights(folder)[1]["run"]["curve"]]
    assert curve(a) == curve(b)

def result(folder, rank=0): return json.loads((folder/f"rank-{rank}.json").read_text())

def test_two_ranks_train_like_one(runs):
    top, ends, _ = runs
    assert ends["one"] == [0] and ends["two"] == [0, 0]
    close(top/"one", top/"two")
    one, two = result(top/"one"), result(top/"two")
    assert result(top/"two", 1) == two
    for key in ("step", "epoch", "units", "effective_batch_size", "skipped"): assert one[key] == two[key], key
    assert math.isclose(one["audio_hours"], two["audio_hours"]) and one["counts"]["long"] == two["counts"]["long"]
    assert math.isclose(one["best"]["value"], two["best"]["value"], rel_tol=1e-3)

def test_a_rank_out_of_memory_splits_its_batches(runs):
    top, ends, _ = runs
    assert ends["memory"] == [0, 0]
    close(top/"two", top/"memory")

def test_killed_ranks_resume_exactly(runs):
    top, ends, _ = runs
    assert ends["kills"] >= 3
    same(top/"two", top/"killed")

def test_a_signal_to_one_rank_stops_both(runs):
    top, ends, stderr = runs
    assert ends["signalled"] == [3, 3] and ends["signalled again"] == [0, 0]
    assert 3 <= int(ends["signalled at"][5:]) < STEPS
    assert f"0 a signal to another rank at step {int(ends['signalled at'][5:])}; saved as " in stderr
    same(top/"two", top/"signalled")

def test_a_bad_step_is_skipped_by_both_ranks(runs):
    top, ends, _ = runs
    assert ends["skipped"] == [0, 0]
    assert result(top/"skipped")["skipped"] == result(top/"skipped", 1)["skipped"] > 1
    row = json.loads((top/"skipped/bad_steps.jsonl").read_text().splitlines()[0])
    assert {b["number"]: b["loss"] for b in row["window"]}[1] == "nan" and len(row["window"]) == 4

def test_too_many_bad_steps_end_both_ranks_and_keep_the_window(runs):
    top, ends, stderr = runs
    assert ends["aborted"] == [4, 4] and "3 steps in a row" in stderr
    rows = [json.loads(line) for line in (top/"aborted/bad_steps.jsonl").read_text().splitlines()]
    kept = [Batch(**b) for b in load_batches(top/"aborted/bad_window.safetensors")]
    assert sorted(b.number for b in kept) == sorted(b["number"] for b in rows[-1]["window"])
    assert any(b.number % 2 for b in kept)

def test_a_requested_stop_ends_both_ranks(runs):
    top, ends, _ = runs
    assert ends["stopped"] == [0, 0]
    assert result(top/"stopped") == result(top/"stopped", 1)
    assert result(top/"stopped")["stopped"] == "enough" and result(top/"stopped")["step"] == 12 # exchanged with the sums of the next step

def test_a_budget_in_hours_ends_both_ranks(runs):
    top, ends, _ = runs
    assert ends["hours"] == [0, 0] and result(top/"hours")["hours"] >= 0.5/3600

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(Path(sys.argv[1]))
