"""A tracker under kill -9 and changed clocks, and lines 44 to 53 of the review of the plan's sample, each as a test."""
import json, math, os, random, signal, subprocess, sys, time, warnings

import pytest

from ai2text.ttq import ACHIEVED, LATE, MISSED, TTQObserver, TTQTracker, load_log, read_entries, read_milestones

PLAN = [dict(wer=.30, budget_hours=4), dict(wer=.20, budget_hours=12), dict(wer=.15, budget_hours=48), dict(wer=.10, budget_hours=120)]

class Clock:
    "Time that the test passes itself."
    def __init__(self): self.now, self.wall = 7., 1.7e9
    def monotonic(self): return self.now
    def time(self): return self.now + self.wall
    def go(self, hours): self.now += hours*3600

@pytest.fixture
def clock(): return Clock()
@pytest.fixture
def said(): return []
@pytest.fixture
def tracker(tmp_path, clock, said):
    "Makes trackers of one log."
    return lambda milestones=PLAN, **kw: TTQTracker(milestones, tmp_path/"results/ttq_log.json", clock=clock, announce=said.append, **kw)

def tell(run, clock, wers, hours=1., **more):
    for epoch,wer in enumerate(wers, 1):
        clock.go(hours)
        run.log_epoch(epoch, 1., wer, step=epoch*10, **more)

def view(run): return json.loads(run.log_file.read_text())

def test_44_achieved_is_append_only(tracker, clock):
    run = tracker()
    tell(run, clock, [.28, .25, .35])
    assert [(a["target_wer"], a["achieved_wer"], a["elapsed_hours"]) for a in view(run)["achieved"]] == [(.3, .28, 1)]

def test_45_told_once_and_late_and_missed_recorded(tracker, clock, said):
    run = tracker()
    tell(run, clock, [.28, .25, .24], hours=2)
    tell(run, clock, [.22, .19], hours=4)
    run.end()
    assert [m["state"] for m in view(run)["milestones"]] == [ACHIEVED, LATE, MISSED, MISSED]
    assert [sum(s.startswith(f"🎯 TTQ milestone {wer}") for s in said) for wer in ("30.0%", "20.0%")] == [1, 1]
    assert sum("missed" in s for s in said) == 2 # at the end

def test_46_a_second_process_goes_on(tracker, clock):
    run = tracker()
    tell(run, clock, [.5, .4])
    clock.go(.5)
    clock.go(9)                                   # killed half an hour ago, restarted after the night
    again = tracker()
    again.resumed(10)
    tell(again, clock, [.4, .29])
    log = view(again)
    assert [h["elapsed_hours"] for h in log["history"]] == [1, 2, 3, 4]
    assert log["totals"]["down_hours"] == 9.5 and log["milestones"][0]["state"] == ACHIEVED

def test_46_lost_work_counts(tracker, clock):
    run = tracker(beat_seconds=60)
    tell(run, clock, [.5])
    run.saved(10)
    for _ in range(120): clock.go(1/60); run.beat(step=20)
    again = tracker()
    again.resumed(10)
    tell(again, clock, [.29])
    assert view(again)["totals"] | dict(elapsed_hours=4, lost_hours=2) == view(again)["totals"]

def test_47_a_changed_wall_clock_changes_no_duration(tracker, clock):
    run = tracker()
    tell(run, clock, [.5])
    clock.wall -= 86400
    tell(run, clock, [.29])
    clock.wall += 10*86400
    tell(run, clock, [.25])
    assert [h["elapsed_hours"] for h in view(run)["history"]] == [1, 2, 3] and view(run)["totals"]["down_hours"] == 0

def test_48_time_is_split(tracker, clock):
    run = tracker()
    for epoch in (1, 2):
        clock.go(1)
        run.log_epoch(epoch, 1., .5, clocks=dict(training=epoch*2000., data=epoch*400., evaluation=epoch*1200.))
    again = tracker()
    clock.go(1)
    again.log_epoch(3, 1., .5, clocks=dict(training=2400., evaluation=1200.))
    totals = view(again)["totals"]
    assert (totals["elapsed_hours"], totals["training_hours"]) == (3, 2)
    assert totals["clocks"] == dict(training=round(6400/3600, 6), data=round(800/3600, 6), evaluation=1)

def test_49_any_cadence(tracker, clock):
    run = tracker()
    for step in range(1, 36):
        clock.go(.1)
        run.log_epoch(1, 1., (60 - step)/100, step=step)
    achieved, = view(run)["achieved"]
    assert (achieved["step"], achieved["epoch"], achieved["elapsed_hours"]) == (30, 1, 3)

def test_50_device_hours_and_cost(tracker, clock):
    run = tracker(devices=2, price_per_hour=1.5)
    tell(run, clock, [.5, .29])
    totals = view(run)["totals"]
    assert (totals["device_hours"], totals["cost"], view(run)["achieved"][0]["cost"]) == (4, 6, 6)

@pytest.mark.parametrize("wers, interval, confirmed", [
    ([.5, .29, .31], None, False), ([.5, .29, .31, .29, .28], None, True), ([.5, .29, math.nan, .29], None, False), ([.5, .29], (.28, .299), True), ([.5, .29], (.27, .31), False)])
def test_51_one_noisy_crossing_is_not_confirmed(tracker, clock, wers, interval, confirmed):
    run = tracker(PLAN[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tell(run, clock, wers, interval=interval)
    achieved, = view(run)["achieved"]
    assert (achieved["confirmed"], achieved["elapsed_hours"]) == (confirmed, 2)

def test_51_another_set_confirms_nothing(tracker, clock):
    run = tracker(PLAN[:1])
    tell(run, clock, [.29], evaluation_set="a")
    clock.go(1)
    run.log_epoch(2, 1., .28, step=20, evaluation_set="b")
    assert not view(run)["achieved"][0]["confirmed"]

@pytest.mark.parametrize("wer", [math.nan, math.inf, -.1])
def test_52_a_wer_that_is_none(tracker, clock, wer):
    run = tracker()
    with pytest.warns(UserWarning, match="recorded as invalid"): tell(run, clock, [wer])
    assert view(run)["achieved"] == [] and view(run)["history"][0]["val_wer"] is None and view(run)["totals"]["invalid"] == 1

@pytest.mark.parametrize("milestones, error", [
    ([dict(wer=30, budget_hours=4)], "write 0.30 for 30%"), ([dict(wer=math.nan, budget_hours=4)], "wer: nan"), ([dict(wer=.3, budget_hours=math.nan)], "budget_hours: nan"),
    ([dict(wer=.3, budget_hours=0)], "budget_hours"), (PLAN + PLAN[:1], "is there twice"), ([dict(wer=.3, budget_hours=4), dict(wer=.2, budget_hours=2)], "less than the 4"), ([dict(wer=.3)], "missing")])
def test_52_wrong_milestones(milestones, error):
    with pytest.raises(ValueError, match=error): read_milestones(milestones)

def test_53_folder_made_written_whole_by_one_rank(tracker, clock, tmp_path, monkeypatch):
    first, other = tracker(), tracker(rank=1)
    for run in (first, other): tell(run, clock, [.5])
    assert len(view(first)["history"]) == 1 and other.log["history"][0]["val_wer"] == .5
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError): tell(first, clock, [.4])
    assert len(view(first)["history"]) == 1                       # the old view is whole, and the truth has the new entry
    assert len(load_log(first.truth)["history"]) == 2

def test_53_a_second_writer_is_found_out(tracker, clock):
    first = tracker()
    tell(first, clock, [.5])
    tell(tracker(), clock, [.5])
    with pytest.raises(RuntimeError, match="another process writes this log"): tell(first, clock, [.4])

def test_full_disk_leaves_whole_entries(tracker, clock, monkeypatch):
    run, write = tracker(), os.write
    tell(run, clock, [.5])
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:20]))
    with pytest.raises(OSError, match="No space left"): tell(run, clock, [.4])
    monkeypatch.undo()
    tell(run, clock, [.3])
    assert read_entries(run.truth)[1] == 0 and [h["val_wer"] for h in view(run)["history"]] == [.5, .3]

LIFE = """
import json, sys, time
from ai2text.ttq import TTQTracker
class Clock: # the wall clock jumps about by days, another offset in each life
    monotonic, offset = staticmethod(time.monotonic), float(sys.argv[2])
    def time(self): return time.time() + self.offset
run = TTQTracker([dict(wer=.6, budget_hours=1), dict(wer=.3, budget_hours=1)], sys.argv[1], beat_seconds=.01, clock=Clock(), announce=lambda s: None)
step = int(sys.argv[3])
run.resumed(step)
while True:
    step += 1
    run.log_epoch(1, 1., max(5, 100 - 5*step)/100, step=step)
    print(step, run.seconds, flush=True) # the write has returned
    for _ in range(10): run.beat(step=step); time.sleep(.001)
"""

def live(log, step, rng):
    "One life of a simulated run, killed at a random moment: the last step it reported, and the seconds it had lived by then."
    life = subprocess.Popen([sys.executable, "-c", LIFE, log, str(rng.uniform(-1e6, 1e6)), str(step)], stdout=subprocess.PIPE, text=True)
    lines = [life.stdout.readline() for _ in range(rng.randint(1, 10))]
    time.sleep(rng.uniform(0, .03))
    life.send_signal(signal.SIGKILL)
    lines += [line for line in life.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
    return int(lines[-1].split()[0]), float(lines[-1].split()[1])

def test_kill_9_loses_no_entry_and_doubles_no_milestone(tmp_path):
    rng, log, step, lived, seen = random.Random(0), tmp_path/"run/ttq_log.json", 0, 0., set()
    for kill in range(12):
        reported, seconds = live(str(log), step, rng)
        seen |= set(range(step + 1, reported + 1))
        lived += seconds
        if kill % 3 == 0:
            with open(log.with_suffix(".jsonl"), "ab") as f: f.write(b'{"kind": "eval') # and a write is torn
        step = max(0, reported - 2)                                                   # resumed from an older checkpoint
    books = load_log(log.with_suffix(".jsonl"))
    assert seen <= {h["step"] for h in books["history"]}
    assert [(a["target_wer"], a["step"]) for a in books["achieved"]] == [(.6, 8), (.3, 14)]
    assert len(books["lives"]) == 12 and any(h.get("repeated") for h in books["history"])
    assert -.05 <= books["total_elapsed_hours"]*3600 - lived <= 12*.5                # what was reported, and up to the last beat

def test_with_the_trainer(tmp_path):
    import torch
    from ai2text.batch import Loss, collate
    from ai2text.trainer import Budget, Every, TrainerOptimized
    class Model(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(1))
        def forward(self, batch): return Loss((self.w*batch.audio).pow(2).sum(), torch.tensor(float(len(batch))), {})
    class Loader:
        def __iter__(self): return (collate([torch.ones(16).numpy()]*2, ["a"]*2, ["u", "v"], 0, i) for i in range(4))
        def state_dict(self): return {}
        def load_state_dict(self, state): pass
    def fit(steps, name):
        model = Model()
        trainer = TrainerOptimized(model, torch.optim.SGD(model.parameters(), lr=.001), batch_size=2, accumulation_steps=1, use_amp=False)
        run = TTQTracker([dict(wer=.5, budget_hours=1)], tmp_path/name/"ttq_log.json", announce=len)
        trainer.fit(Loader(), Budget(max_steps=steps), [TTQObserver(run)], tmp_path/name, evaluate=lambda m: dict(val_wer=.4, val_wer_low=.3, val_wer_high=.45), evaluate_every=Every(steps=4))
        return load_log(run.log_file)
    log = fit(8, "a")
    assert [h["step"] for h in log["history"]] == [4, 8] and log["finished"]
    achieved, = log["achieved"]
    assert achieved["confirmed_by"] == "interval" and len(achieved["checkpoint"]) == 64 and achieved["interval"] == [.3, .45]
    assert {"startup", "data", "training", "evaluation", "checkpoint"} <= log["totals"]["clocks"].keys()
    assert log["totals"]["utterances"] == 16 and log["about"]["budget"]["max_steps"] == 8
    assert sum(log["totals"]["clocks"].values()) == pytest.approx(log["total_elapsed_hours"], abs=.5/3600)
    assert fit(8, "a") == log                                     # a finished run is not reopened
