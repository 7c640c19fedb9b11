"A copy of the project with small parameters, in a git repository of its own, for tests of the whole pipeline."
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
M = "conformer_ctc"
# Short stages; training long enough to be interrupted.
SMALL = dict(
    corpora=dict(demo=dict(sentences=24, dev_sentences=4, test_sentences=4, processes=1)),
    prepare=dict(tokenizer="char", processes=1),
    shards=dict(shard_size=20, processes=1),
    train=dict(
        max_steps=60, batch_seconds=8.0, warmup_steps=5, evaluate_every_steps=20, checkpoint_minutes=0.01,
        amp_dtype="fp32", threads=1, seed=3
    ),
    models={M: dict(size="tiny", dynamic_chunk_prob=0.5)},
    export=dict(min_utterances=1, utterances=2, runtime_utterances=1, max_wer_gap=1.0, max_int8_gap=1.0),
)
STAGES = ("identity", "corpus@demo", "prepare", "shards", f"init@{M}", f"train@{M}", f"evaluate@{M}", "compare", "export")


def environment(**changes)->dict:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1", "PYTHONPATH": "", **changes}
    return {k: v for k, v in env.items() if v is not None}


class Workspace:
    "A copy of the project's files with small parameters, in a git repository of its own."
    def __init__(self, root:Path):
        self.root = root
        listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listing.stdout.split("\n")):
            if {"papermill_runs", "results", "comparison", "dvc.lock"} & set(Path(name).parts) or not (ROOT/name).is_file(): continue
            (root/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/name, root/name)
        self.change(SMALL)
        self.run("git", "init", "-q")

    @classmethod
    def copy(cls, folder:Path, root:Path):
        "A copy of a workspace with all outputs, a few MB."
        self = cls.__new__(cls)
        self.root = Path(shutil.copytree(folder, root, symlinks=True, dirs_exist_ok=True))
        return self

    def change(self, values:dict):
        "Write values into params.yaml; None removes a key."
        yaml, path = YAML(), self.root/"params.yaml"
        params = yaml.load(path)
        def merge(old, new):
            for k, v in new.items():
                if isinstance(v, dict): merge(old.setdefault(k, {}), v)
                elif v is None: del old[k]
                else: old[k] = v
        merge(params, values)
        with open(path, "w", encoding="utf-8") as f: yaml.dump(params, f)

    def run(self, *command, ok=True, stderr=False, **changes)->str:
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, env=environment(**changes), stdin=subprocess.DEVNULL)
        assert done.returncode == 0 or not ok, (
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done.stdout + done.stderr*stderr

    def repro(self, *targets:str)->set:
        "Run the pipeline, or a part of it; returns the stages that ran, except `starts`, which always runs."
        return {line.split("'")[1] for line in self.run("dvc", "repro", *targets).splitlines() if line.startswith("Running stage")} - {
            "starts"
        }

    def start(self, *targets:str, **changes)->subprocess.Popen:
        return subprocess.Popen(["dvc", "repro", *targets], cwd=self.root, env=environment(**changes), stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def train(self, **changes):
        "Run the stage `train` in this process, without its notebook."
        from ai2text.core.layout import Layout
        from ai2text.core.params import load_params
        from ai2text.core.sections import section
        from ai2text.training.advice import train_values
        from ai2text.training.publish import publish
        from ai2text.training.run import fit
        layout, params = Layout(self.root), load_params(self.root/"params.yaml")
        milestones = params["milestones"][params["train"]["milestones"]]
        publish(M, fit(M, section("train", train_values(params, params["models"][M]) | changes), milestones, layout), milestones, layout)

    def folders(self)->set: return set(self.root.glob(f".runs/{M}/*/*/"))

    def wait_for_checkpoint(self, known:set, seconds:float=300.)->tuple:
        "Wait until a run that is not `known` has a checkpoint; returns its folder and step."
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for folder in self.folders() - known:
                steps = [int(p.parent.name[5:]) for p in folder.glob("checkpoints/step-*/checkpoint.json")]
                if steps: return folder, max(steps)
            time.sleep(0.05)
        raise AssertionError(f"no checkpoint within {seconds} s")

    def log(self)->dict: return json.loads((self.root/f"results/{M}/ttq_log.json").read_text())
    def metrics(self)->bytes: return (self.root/f"results/{M}/metrics.json").read_bytes()
    def runs(self)->list: return sorted(p.parent.as_posix() for p in self.root.glob(f".runs/{M}/*/*/result.json"))
    def report(self, name:str)->Path: return self.root/f"papermill_runs/{name}.ipynb"
