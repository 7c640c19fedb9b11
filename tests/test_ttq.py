"""The log of a run: milestones, counted time, confirmation, errors; its forecasts; the tracker in a trainer."""
import json, math, os, warnings
from types import SimpleNamespace

import pytest

from ai2text.training.budget import Budget
from ai2text.ttq.log import (
    ACHIEVED, LATE, MISSED, TTQObserver, TTQTracker, forecast_run, load_log, read_entries, read_milestones,
    forecast_outcomes
)

PLAN = [dict(wer=.30, budget_hours=4), dict(wer=.20, budget_hours=12), dict(wer=.15, budget_hours=48), dict(wer=.10, budget_hours=120)]

class Clock:
    "A clock that the test advances."
    def __init__(self): self.now, self.wall = 7., 1.7e9
    def monotonic(self): return self.now
    def time(self): return self.now + self.wall
    def go(self, hours): self.now += hours*3600

@pytest.fixture
def clock(): return Clock()
@pytest.fixture
def messages(): return []
@pytest.fixture
def tracker(tmp_path, clock, messages):
    "Makes trackers of one log."
    return lambda milestones=PLAN, **kw: TTQTracker(
        milestones, tmp_path / "results/ttq_log.json", clock=clock, announce=messages.append, **kw
    )


def log_evaluations(run, clock, wers, hours=1., **more):
    for epoch,wer in enumerate(wers, 1):
        clock.go(hours)
        run.log_epoch(epoch, 1., wer, step=epoch*10, **more)

def view(run): return json.loads(run.log_file.read_text())

def test_a_crossing_is_not_changed_by_later_evaluations(tracker, clock):
    run = tracker()
    log_evaluations(run, clock, [.28, .25, .35])
    assert [(a["target_wer"], a["achieved_wer"], a["elapsed_hours"]) for a in view(run)["achieved"]] == [(.3, .28, 1)]

def test_milestones_are_announced_once_and_recorded_as_late_or_missed(tracker, clock, messages):
    run = tracker()
    log_evaluations(run, clock, [.28, .25, .24], hours=2)
    log_evaluations(run, clock, [.22, .19], hours=4)
    run.end()
    assert [m["state"] for m in view(run)["milestones"]] == [ACHIEVED, LATE, MISSED, MISSED]
    assert [sum(s.startswith(f"🎯 TTQ milestone {wer}") for s in messages) for wer in ("30.0%", "20.0%")] == [1, 1]
    assert sum("missed" in s for s in messages) == 2 # at the end

def test_a_second_attempt_resumes(tracker, clock):
    run = tracker()
    log_evaluations(run, clock, [.5, .4])
    clock.go(.5)
    clock.go(9)                                   # killed half an hour after the last entry, restarted 9 h later
    again = tracker()
    again.resumed(10)
    log_evaluations(again, clock, [.4, .29])
    log = view(again)
    assert [h["elapsed_hours"] for h in log["history"]] == [1, 2, 3, 4]
    assert log["totals"]["down_hours"] == 9.5 and log["milestones"][0]["state"] == ACHIEVED

def test_lost_work_counts_in_the_budget(tracker, clock):
    run = tracker(beat_seconds=60)
    log_evaluations(run, clock, [.5])
    run.saved(10)
    for _ in range(120): clock.go(1/60); run.beat(step=20)
    again = tracker()
    again.resumed(10)
    log_evaluations(again, clock, [.29])
    assert view(again)["totals"] | dict(elapsed_hours=4, lost_hours=2) == view(again)["totals"]

def test_a_changed_wall_clock_changes_no_duration(tracker, clock):
    run = tracker()
    log_evaluations(run, clock, [.5])
    clock.wall -= 86400
    log_evaluations(run, clock, [.29])
    clock.wall += 10*86400
    log_evaluations(run, clock, [.25])
    assert [h["elapsed_hours"] for h in view(run)["history"]] == [1, 2, 3] and view(run)["totals"]["down_hours"] == 0

def test_time_is_split_by_phase(tracker, clock):
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

def test_evaluations_come_at_any_cadence(tracker, clock):
    run = tracker()
    for step in range(1, 36):
        clock.go(.1)
        run.log_epoch(1, 1., (60 - step)/100, step=step)
    achieved, = view(run)["achieved"]
    assert (achieved["step"], achieved["epoch"], achieved["elapsed_hours"]) == (30, 1, 3)

def test_device_hours_and_cost(tracker, clock):
    run = tracker(devices=2, price_per_hour=1.5)
    log_evaluations(run, clock, [.5, .29])
    totals = view(run)["totals"]
    assert (totals["device_hours"], totals["cost"], view(run)["achieved"][0]["cost"]) == (4, 6, 6)

@pytest.mark.parametrize(
    "wers, interval, confirmed",
    [
        ([0.5, 0.29, 0.31], None, False), ([0.5, 0.29, 0.31, 0.29, 0.28], None, True),
        ([0.5, 0.29, math.nan, 0.29], None, False), ([0.5, 0.29], (0.28, 0.299), True),
        ([0.5, 0.29], (0.27, 0.31), False)
    ],
)
def test_a_single_crossing_is_not_confirmed(tracker, clock, wers, interval, confirmed):
    run = tracker(PLAN[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log_evaluations(run, clock, wers, interval=interval)
    achieved, = view(run)["achieved"]
    assert (achieved["confirmed"], achieved["elapsed_hours"]) == (confirmed, 2)

def test_another_evaluation_set_does_not_confirm(tracker, clock):
    run = tracker(PLAN[:1])
    log_evaluations(run, clock, [.29], evaluation_set="a")
    clock.go(1)
    run.log_epoch(2, 1., .28, step=20, evaluation_set="b")
    assert not view(run)["achieved"][0]["confirmed"]

@pytest.mark.parametrize("wer", [math.nan, math.inf, -.1])
def test_an_invalid_wer_is_recorded(tracker, clock, wer):
    run = tracker()
    with pytest.warns(UserWarning, match="recorded as invalid"): log_evaluations(run, clock, [wer])
    assert view(run)["achieved"] == [] and view(run)["history"][0]["val_wer"] is None and view(run)["totals"]["invalid"] == 1

@pytest.mark.parametrize(
    "milestones, error",
    [
        ([dict(wer=30, budget_hours=4)], "write 0.30 for 30%"), ([dict(wer=math.nan, budget_hours=4)], "wer: nan"),
        ([dict(wer=0.3, budget_hours=math.nan)], "budget_hours: nan"),
        ([dict(wer=0.3, budget_hours=0)], "budget_hours"), (PLAN + PLAN[:1], "is there twice"),
        ([dict(wer=0.3, budget_hours=4), dict(wer=0.2, budget_hours=2)], "less than the 4"),
        ([dict(wer=0.3)], "missing")
    ],
)
def test_invalid_milestones_are_errors(milestones, error):
    with pytest.raises(ValueError, match=error): read_milestones(milestones)

def test_only_rank_0_writes_and_the_view_is_replaced_atomically(tracker, clock, tmp_path, monkeypatch):
    first, other = tracker(), tracker(rank=1)
    for run in (first, other): log_evaluations(run, clock, [.5])
    assert len(view(first)["history"]) == 1 and other.log["history"][0]["val_wer"] == .5
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError): log_evaluations(first, clock, [.4])
    assert len(view(first)["history"]) == 1                       # the old view is intact, and the log has the new entry
    assert len(load_log(first.entries_file)["history"]) == 2

def test_a_second_writer_is_an_error(tracker, clock):
    first = tracker()
    log_evaluations(first, clock, [.5])
    log_evaluations(tracker(), clock, [.5])
    with pytest.raises(RuntimeError, match="another process writes this log"): log_evaluations(first, clock, [.4])

def test_a_full_disk_leaves_whole_entries(tracker, clock, monkeypatch):
    run, write = tracker(), os.write
    log_evaluations(run, clock, [.5])
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:20]))
    with pytest.raises(OSError, match="No space left"): log_evaluations(run, clock, [.4])
    monkeypatch.undo()
    log_evaluations(run, clock, [.3])
    assert read_entries(run.entries_file)[1] == 0 and [h["val_wer"] for h in view(run)["history"]] == [.5, .3]

# Forecasts in the log

def half_a_run(run, clock, n=10, first=1, of=20):
    "Evaluations of a run whose error rate falls with the square root of the time."
    run.resumed(10*(first - 1), schedule=dict(max_steps=10*of, max_hours=0., max_audio_hours=0., decay=0.))
    for epoch in range(first, n + 1):
        clock.go(.5)
        run.log_epoch(epoch, 1., .15*(epoch/of)**-.5, step=10*epoch)

def test_time_and_cost_to_milestones_are_forecast(tracker, clock):
    run = tracker(devices=2, price_per_hour=1.5)
    half_a_run(run, clock)
    forecast = run.forecast
    twenty, fifteen, ten = forecast["milestones"]
    assert (forecast["step"], forecast["at_hours"], forecast["progress"], forecast["refused"], forecast["horizon_hours"]) == (
        100, 5, 0.5, None, 10
    )
    assert (
        5 < twenty["early_hours"] <= twenty["middle_hours"] <= 7
        and twenty["cost"] == pytest.approx(3 * twenty["middle_hours"])
        and twenty["probability"] > 0.8
    )
    assert ten["early_hours"] is None and ten["cost"] is None and ten["probability"] < .05
    assert fifteen["probability"] <= twenty["probability"] and forecast["end"]["low"] < forecast["end"]["middle"] < forecast["end"]["high"]
    assert "curve" not in forecast and forecast_run(view(run)) == forecast | dict(curve=forecast_run(view(run))["curve"])

def test_a_forecast_follows_each_evaluation_and_nothing_else(tracker, clock):
    run = tracker(beat_seconds=1)
    half_a_run(run, clock)
    for _ in range(5):
        clock.go(.1)
        run.beat(step=105)
    run.saved(105)
    with pytest.warns(UserWarning): run.log_epoch(11, 1., math.nan, step=110)
    kinds = [e["kind"] for e in read_entries(run.entries_file)[0]]
    assert [kinds[i+1] for i,k in enumerate(kinds[:-1]) if k == "evaluation"] == ["forecast"]*10 and kinds.count("forecast") == 10
    assert [f["refused"] is None for f in view(run)["forecasts"]] == [False]*4 + [True]*6
    assert view(run)["calibration"]["forecasts"] == 10 and view(run)["calibration"]["refused"] == 4

@pytest.mark.parametrize("torn", [1, 20, 0])
def test_killed_between_evaluation_and_forecast(tracker, clock, torn):
    run = tracker()
    half_a_run(run, clock)
    lines = run.entries_file.read_bytes().splitlines(keepends=True)
    run.entries_file.write_bytes(b"".join(lines[:-1]) + lines[-1][:torn])
    assert len(load_log(run.entries_file)["history"]) == 10
    again = tracker()
    half_a_run(again, clock, 12, 11)
    log = view(again)
    assert [len(log[k]) for k in ("history", "forecasts", "achieved")] == [12, 11, 2] and not any(h.get("repeated") for h in log["history"])

def test_a_log_without_forecasts_is_read(tracker, clock):
    run = tracker()
    half_a_run(run, clock)
    before, old = view(run), [line for line in run.entries_file.read_text().splitlines(keepends=True) if '"kind": "forecast"' not in line]
    run.entries_file.write_text("".join(old))
    log = load_log(run.entries_file)
    assert log["forecasts"] == [] and log["calibration"]["forecasts"] == 0 and forecast_run(log) == forecast_run(before)
    assert {k: v for k, v in log.items() if k not in ("forecasts", "calibration")} == {
        k: v for k, v in before.items() if k not in ("forecasts", "calibration")
    }
    run.log_file.write_text(json.dumps({k: v for k,v in before.items() if k not in ("forecasts", "calibration")}))
    assert load_log(run.log_file)["forecasts"] == []

def test_forecasts_are_scored_when_the_outcome_is_known(tracker, clock):
    run = tracker([dict(wer=.2, budget_hours=8), dict(wer=.1, budget_hours=9)])
    half_a_run(run, clock)
    assert view(run)["calibration"]["scored"] == 0
    half_a_run(run, clock, 20, 11)                    # 20% after 6 hours; the budget of 10% is spent after 9
    scores = view(run)["calibration"]
    twenty = [f for f in view(run)["forecasts"] if any(m["wer"] == .2 for m in f["milestones"])]
    assert scores["n_covered"] == len(twenty) == 7 and scores["scored"] == 7 + 13 and scores["confident"] == scores["correct"]
    assert scores["covered"] >= .8 and scores["hours_error"] < .1 and scores["brier"] < .1

def test_forecasts_of_another_schedule_are_not_scored(tracker, clock, tmp_path):
    run = tracker()
    half_a_run(run, clock)
    run.saved(80)
    longer = TTQTracker(PLAN, tmp_path/"longer/ttq_log.json", clock=clock, announce=len)
    longer.adopt(run.entries_file, 80)
    assert read_entries(longer.entries_file)[0][-1]["step"] == 80
    half_a_run(longer, clock, 40, 9, of=40)
    log = view(longer)
    assert [bool(f.get("void")) for f in log["forecasts"]] == [True]*10 + [False]*32
    assert all(v["at_hours"] > 5 for v in forecast_outcomes(log)) and log["calibration"]["scored"]

def test_a_stopped_run_records_its_reason(tracker, clock):
    phases = dict.fromkeys(("startup", "data", "training", "evaluation", "checkpoint", "lost"), 0.)
    trainer = SimpleNamespace(
        folder=None, audio_hours=1.0, state=SimpleNamespace(step=0, units=8.0, best={}),
        clocks=SimpleNamespace(read=lambda: dict(phases)), budget=Budget(max_steps=200), schedule=None,
        stopped="hopeless"
    )
    run = tracker()
    observer = TTQObserver(run)
    observer.on_start(trainer)
    half_a_run(run, clock, 12)
    observer.on_end(trainer, "finished")
    log = view(run)
    assert (log["finished"], log["reason"]) == (True, "hopeless") and log["about"]["schedule"]["max_steps"] == 200
    assert {v["wer"] for v in forecast_outcomes(log) if v["in_budget"] is not None} == {.2}  # the outcome of the others is not known
    assert [m["state"] for m in log["milestones"]] == [ACHIEVED, ACHIEVED, MISSED, MISSED]

def test_the_observer_in_a_trainer(tmp_path):
    import torch
    from ai2text.core.batch import Loss, collate
    from ai2text.training.budget import Every
    from ai2text.training.trainer import TrainerOptimized
    class Model(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.ones(1))
        def forward(self, batch): return Loss((self.w*batch.audio).pow(2).sum(), torch.tensor(float(len(batch))), {})
    class Loader:
        def __iter__(self): return (collate([torch.ones(16).numpy()]*2, ["a"]*2, ["u", "v"], 0, i) for i in range(4))
        def state_dict(self): return {}
        def load_state_dict(self, state): pass
    def fit(steps, name):
        model = Model()
        trainer = TrainerOptimized(
            model, torch.optim.SGD(model.parameters(), lr=0.001), batch_size=2, accumulation_steps=1, amp_dtype="fp32"
        )
        run = TTQTracker([dict(wer=.5, budget_hours=1)], tmp_path/name/"ttq_log.json", announce=len)
        trainer.fit(
            Loader(), Budget(max_steps=steps), [TTQObserver(run)], tmp_path / name,
            evaluate=lambda m: dict(val_wer=0.4, val_wer_low=0.3, val_wer_high=0.45), evaluate_every=Every(steps=4)
        )
        return load_log(run.log_file)
    log = fit(8, "a")
    assert [h["step"] for h in log["history"]] == [4, 8] and log["finished"]
    achieved, = log["achieved"]
    assert achieved["confirmed_by"] == "interval" and len(achieved["checkpoint"]) == 64 and achieved["interval"] == [.3, .45]
    assert {"startup", "data", "training", "evaluation", "checkpoint"} <= log["totals"]["clocks"].keys()
    assert log["totals"]["utterances"] == 16 and log["about"]["budget"]["max_steps"] == 8
    assert log["about"]["schedule"] == dict(max_steps=8, max_hours=0, max_audio_hours=0, decay=0) and len(log["forecasts"]) == 2
    assert sum(log["totals"]["clocks"].values()) == pytest.approx(log["total_elapsed_hours"], abs=.5/3600)
    assert fit(8, "a") == log                                     # a finished run is not reopened
