"""The forecast on held-out curves: real runs of this project, and synthetic curves of nine kinds.

The constants of unknown schedules were learned on public curves (nbs/benchmarks/forecast.ipynb, which scores them on held-out
submissions), those of known schedules on curves/development. The runs of curves/heldout were used for neither."""
import csv, dataclasses, hashlib, itertools, json, math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ai2text.ttq import forecast
from ai2text.ttq.forecast import EARLY_QUANTILE, LATE_QUANTILE, CURVE_START, TimeToTarget, time_to_target, futures

CURVES = Path(__file__).parent/"curves"
SHARES = .25, .5, .75, .95                # targets: shares of the way, in log WER, from the best evaluation so far to the best of the run
CUTS = .4, .5, .6, .7                     # shares of a real run at which it is forecast
ROUND = 1e-9                              # times are shares like 12/20: equal ones may differ in the last bit
# of the constants; the benchmark `forecast` learns and judges them: another value needs its report again
FROZEN = "d546e64440fce794d7fe9878dcc96ce45b7740ff2cc737eaff752119946e9cd6"
CONSTANTS = "SHARED LEVEL UNSCHEDULED SCHEDULED WILD DOUBTS CURVE_START FEWEST_POINTS EARLIEST MOST_POINTS RISE WIDEST EARLY_QUANTILE LATE_QUANTILE RECENT LAST_PART".split()


# Curves

@dataclass(frozen=True)
class Curve:
    "A learning curve and the schedule of its run."
    name: str
    progress: np.ndarray        # shares of the schedule, at each evaluation
    wer: np.ndarray
    interval: np.ndarray = None # (N, 2)
    decay: float = 0.           # last share of the schedule, in which the learning rate falls
    hours: np.ndarray = None

    def targets(self, n)->list[tuple[float, float, float]]: # share of the way, WER, share of the schedule at which it was reached
        "Error rates that the run reached after its first n evaluations."
        best, last = self.wer[:n].min(), self.wer.min()
        if last >= best: return []
        wanted = [(share, best*(last/best)**share) for share in SHARES]
        return [(share, wer, self.progress[(self.wer <= wer).argmax()]) for share,wer in wanted]


def read_curve(name:str, run:dict)->Curve: # as development/a-base, and its row in runs.json
    with open(CURVES/f"{name}.csv") as f: rows = list(csv.DictReader(f))
    step, wer, low, high, hours = (np.array([float(row[key]) for row in rows]) for key in ("step", "val_wer", "low", "high", "hours"))
    return Curve(name.split("/")[1], step/run["max_steps"], wer, np.c_[low, high], run["decay"], hours)


def real_curves(folder:str)->list[Curve]:
    "The runs in a folder of tests/curves."
    runs = json.loads((CURVES/"runs.json").read_text())
    return [read_curve(name, run) for name,run in runs.items() if name.startswith(f"{folder}/")]


KINDS = "floor", "plateau", "double descent", "divergence", "noise", "restarts", "step decay", "late start", "overfit"


def synthetic_curve(kind:str, seed:int, n=20)->Curve:
    "A power law with noise, changed by its kind."
    rng, u = np.random.default_rng([KINDS.index(kind), seed]), np.arange(1, n + 1)/n
    end, slope = rng.uniform(.15, .45), rng.uniform(.25, .7)
    y, noise = end*u**-slope, rng.uniform(.005, .02)
    if kind == "floor":
        floor = rng.uniform(.3, .8)*end
        y = floor + (end - floor)*u**-rng.uniform(.8, 2)
    if kind == "plateau": y = end*np.minimum(u, rng.uniform(.3, .8))**-slope
    if kind == "double descent":
        middle = rng.uniform(.3, .7)
        y = y*(1 + rng.uniform(.1, .4)*np.exp(-((u - middle)/rng.uniform(.06, .12))**2))
    if kind == "divergence":
        at = rng.uniform(.4, .85)
        y = np.where(u > at, np.minimum(1, y*(1 + 2*rng.uniform(.5, 3)*(u - at)/(1 - at))), y)
    if kind == "noise": noise = rng.uniform(.05, .15)
    if kind == "restarts":
        times = rng.integers(3, 6)
        y = y*(1 + rng.uniform(.1, .3)*(1 - u*times % 1))
    if kind == "step decay":
        y = end*u**-(slope/2)
        for at in (rng.uniform(.4, .6), rng.uniform(.7, .85)): y = np.where(u > at, y*rng.uniform(.75, .9), y)
    if kind == "late start":
        at = rng.uniform(.2, .5)
        y = np.where(u < at, 1., np.minimum(1, end*np.maximum((u - at)/(1 - at), .02)**-slope))
    if kind == "overfit":
        at = rng.uniform(.4, .8)
        y = y*(1 + np.maximum(u - at, 0)*rng.uniform(.2, 1.2))
    return Curve(f"{kind} {seed}", u, np.clip(y*np.exp(noise*rng.standard_normal(n)), .01, 1.2))


# This forecast and its baselines: each takes a curve and the number of known evaluations

@dataclass(frozen=True)
class Line:
    "A forecast of a baseline: median, lower and upper curve."
    progress: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray

    @property
    def end(self): return self.low[-1], self.middle[-1], self.high[-1]

    def arrive(self, target):
        first = lambda wer: float(self.progress[(wer <= target).argmax()]) if (wer <= target).any() else math.inf
        return TimeToTarget(first(self.low), first(self.middle), first(self.high), float((self.middle <= target).any()))


@dataclass(frozen=True)
class Ours:
    "A forecast of this project, with the interface of `Line`."
    seen: forecast.Futures

    @property
    def end(self): return tuple(self.seen.quantiles(EARLY_QUANTILE, .5, LATE_QUANTILE)[:,-1])
    def arrive(self, target): return time_to_target(self.seen, target)


def ours(curve, n):
    seen = futures(curve.progress[:n], curve.wer[:n], interval_N2=None if curve.interval is None else curve.interval[:n], decay=curve.decay)
    return None if seen.refused else Ours(seen)


def two_lines(curve, n):
    "Lines of log WER over log t and over t through the later half, their geometric mean; the interval lies between both, plus 3%."
    if n < 6 or curve.progress[n-1] < .3: return None
    past, to = slice(n - max(3, n//2), n), curve.progress[n:]
    y = np.log(curve.wer[past])
    lines = [np.polyval(np.polyfit(scale(curve.progress[past]), y, 1), scale(to)) for scale in (np.log, np.asarray)]
    return Line(to, np.exp(np.minimum(*lines))*.97, np.exp(np.mean(lines, axis=0)), np.exp(np.maximum(*lines))*1.03)


def power_law(curve, n):
    "A power law with a floor: least squares of log(WER - floor), the best of 60 floors."
    begun = np.arange(n) >= (curve.wer[:n] < CURVE_START).argmax()
    u, wer, to = curve.progress[:n][begun], curve.wer[:n][begun], curve.progress[n:]
    fits = []
    for floor in np.linspace(0, .99, 60)*wer.min():
        slope, level = np.polyfit(np.log(u), np.log(wer - floor), 1)
        fits.append((((np.log(floor + np.exp(level)*u**slope) - np.log(wer))**2).sum(), floor, slope, level))
    _, floor, slope, level = min(fits)
    line = floor + np.exp(level)*to**slope
    return Line(to, line, line, line)


def last_value(curve, n):
    line = np.full(len(curve.progress) - n, curve.wer[n-1])
    return Line(curve.progress[n:], line, line, line)


METHODS = {"ours": ours, "two lines": two_lines, "power law with floor": power_law, "last value": last_value}


# Scores

def judge(curves, cut:float, method=ours)->dict:
    "Forecasts at a share of each run against the outcome: times at which targets were reached, and the error rate at the end."
    rows, ends, refused = [], [], []
    for curve in curves:
        n = int((curve.progress <= cut + 1e-9).sum())
        seen = method(curve, n)
        if seen is None:
            refused.append(curve.name)
            continue
        low, middle, high = seen.end
        ends.append(dict(run=curve.name, error=abs(middle/curve.wer[-1] - 1), inside=low <= curve.wer[-1] <= high))
        for share,wer,true in curve.targets(n):
            at = seen.arrive(wer)
            rows.append(
                dict(
                    run=curve.name, share=share, error=abs(at.middle - true) / true,
                    inside=at.early - ROUND <= true <= at.late + ROUND, never=math.isinf(at.middle),
                    open=math.isinf(at.late)
                )
            )
    mean = lambda items, key: float(np.mean([o[key] for o in items])) if items else math.nan
    return dict(
        runs=len(ends), refused=refused, targets=len(rows), rows=rows, ends=ends,
        time_error=float(np.quantile([o["error"] for o in rows], 0.5, method="higher")), never=mean(rows, "never"),
        time_inside=mean(rows, "inside"), open=mean(rows, "open"),
        end_error=float(np.median([o["error"] for o in ends])), end_inside=mean(ends, "inside")
    )


def told(curves, cut:float, method=ours, gains=(.97, .95, .9, .85, .8, .7, .6, .5))->list:
    "Probabilities of reaching the best so far times a gain, and whether it was reached."
    rows = []
    for curve in curves:
        n = int((curve.progress <= cut + 1e-9).sum())
        if (seen := method(curve, n)) is None: continue
        best = curve.wer[:n].min()
        rows += [(seen.arrive(best*gain).probability, bool((curve.wer[n:] <= best*gain).any())) for gain in gains]
    return rows


def judge_confident_forecasts(curves, cuts=(.4, .5, .6, .7, .8), gains=(.97, .95, .9, .85, .8, .7, .6, .5))->dict:
    "Counts of forecasts, refusals, intervals that contain the end, confident forecasts (above 90%) of a gain on the best, and their failures."
    found = dict(forecasts=0, refused=0, inside=0, told=[]) # (probability, whether it was reached)
    for curve,cut in itertools.product(curves, cuts):
        n = int((curve.progress <= cut + 1e-9).sum())
        seen, best = ours(curve, n), curve.wer[:n].min()
        found["forecasts"] += 1
        if seen is None:
            found["refused"] += 1
            continue
        found["inside"] += bool(seen.end[0] <= curve.wer[-1] <= seen.end[2])
        found["told"] += [(seen.arrive(best*gain).probability, bool((curve.wer[n:] <= best*gain).any())) for gain in gains]
    sure = [true for probability,true in found["told"] if probability > .9]
    return found | dict(confident=len(sure), failed=len(sure) - sum(sure))


def total(found)->dict:
    "Counts of several kinds together."
    return {key: sum((row[key] for row in found), [] if key == "told" else 0) for key in found[0]}


# Tests

@pytest.fixture(scope="module")
def heldout(): return real_curves("heldout")

@pytest.fixture(scope="module")
def synthetic(): return {kind: judge_confident_forecasts([synthetic_curve(kind, seed) for seed in range(40)]) for kind in KINDS}

def test_constants_are_those_of_the_committed_benchmark():
    assert CONSTANTS == [name for name in vars(forecast) if name.isupper()]
    plain = lambda v: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v
    values = json.dumps({name: plain(getattr(forecast, name)) for name in CONSTANTS}, sort_keys=True)
    assert hashlib.sha256(values.encode()).hexdigest() == FROZEN, values

def test_held_out_runs_are_many_and_different(heldout):
    runs, files = (
        json.loads((CURVES / "runs.json").read_text()),
        {o.relative_to(CURVES).with_suffix("").as_posix() for o in CURVES.rglob("*.csv")},
    )
    assert set(runs) == files and len(heldout) >= 12
    settings = [json.dumps(run, sort_keys=True) for run in runs.values()]
    assert len(set(settings)) == len(settings), "each run has its own settings"
    for key in ("seed", "lr", "decay", "max_steps", "d_model", "optimizer", "train_shards"):
        assert len({runs[f"heldout/{curve.name}"][key] for curve in heldout}) > 1, key
    assert all(curve.progress[-1] == 1 and (np.diff(curve.hours) > 0).all() for curve in heldout)

def test_time_to_target_from_half_of_the_schedule(heldout):
    "No worse than the earlier forecast: median error 8.3% from half of the schedule, 5.3% from 70%; 21% and 9% of reached targets missed."
    for cut,error,never in ((.5, .083, .214), (.7, .053, .089)):
        found = judge(heldout, cut)
        assert found["runs"] >= 12 and found["targets"] >= 4*12 and found["time_error"] <= error and found["never"] <= never, (cut, found)

def test_intervals_cover_80_percent_from_half_of_the_schedule(heldout):
    "They are wide for these runs with known schedules: [early, late] covers nearly all."
    found = judge(heldout, .5)
    assert found["time_inside"] >= .8 and found["end_inside"] >= .8, found

def test_forecast_is_better_than_the_baselines(heldout):
    "In the error at the end and in the Brier score."
    for cut in CUTS:
        mine, lines, *others = (judge(heldout, cut, method) for method in METHODS.values())
        assert all(mine["end_error"] < o["end_error"] and mine["time_error"] < o["time_error"] for o in others), cut
        assert mine["end_inside"] >= .8 > lines["end_inside"] and mine["end_error"] < lines["end_error"], cut
        brier = {name: np.mean([(p - true)**2 for p,true in told(heldout, cut, method)]) for name,method in METHODS.items()}
        assert brier["ours"] == min(brier.values()), (cut, brier)

@pytest.mark.slow
def test_confident_forecasts_are_correct(synthetic):
    "At most one in ten fails over all kinds; failures are of kinds that the past does not show: divergence, plateau, overfit."
    found = total(list(synthetic.values()))
    assert found["confident"] >= 500 and found["failed"] <= 0.1 * found["confident"], {
        kind: (o["confident"], o["failed"]) for kind, o in synthetic.items()
    }


def test_confident_forecasts_of_real_runs_are_correct(heldout):
    found = judge_confident_forecasts(heldout, CUTS)
    assert found["confident"] >= 10 and found["failed"] <= .1*found["confident"], found

@pytest.mark.slow
def test_rising_and_late_curves_are_refused(synthetic):
    "Most others are forecast."
    share = {kind: o["refused"]/o["forecasts"] for kind,o in synthetic.items()}
    assert share["divergence"] > .3 and share["late start"] > .3 and share["step decay"] < .1 and share["plateau"] < .1, share
