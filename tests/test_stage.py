"The stage runner as a process: exit status, signals, and the death of its parent or of itself."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import ai2text
from ai2text.pipeline.stage_runner import run_stage
from conftest import too

PACKAGE = Path(ai2text.__file__).parent
RUN = ["-m", "ai2text.pipeline.cli", "stage", "shards"] # whatever its notebook here does
# Counts its interrupts, takes a second to save after the first, then raises, as the trainer does.
TRAIN = """
import os, signal, subprocess, sys, time
from pathlib import Path
interrupts = []
signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path("started").write_text(f"{os.getpid()} {helper.pid}")
print("training")
while not interrupts: time.sleep(0.05)
time.sleep(1)
Path("saved").write_text(str(len(interrupts)))
raise KeyboardInterrupt
"""

# A stage with two ranks.
RANKS = """
import os, time
from pathlib import Path
def work(ranks):
    pids = ranks.gather(os.getpid())
    if ranks.main:
        print("working")
        Path("started.part").write_text(" ".join(map(str, pids)))
        os.rename("started.part", "started")
    try:
        while True: time.sleep(0.05)
    except KeyboardInterrupt:
        Path(f"saved-{ranks.rank}").touch()
        raise
"""


def project(root:Path, *cells:str, seed=2)->Path:
    "A project whose stage `shards` runs these cells."
    (root/"nbs/stages").mkdir(parents=True)
    (root/"dvc.yaml").touch()
    (root/"params.yaml").write_text(json.dumps(dict(shards=dict(seed=seed))))
    first = new_code_cell("workspace: str = ''\nconfig: dict = {}", metadata=dict(tags=["parameters"]))
    notebook = new_notebook(
        cells=[first, *map(new_code_cell, cells)], metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3"))
    )
    nbformat.write(notebook, root/"nbs/stages/shards.ipynb")
    return root


def environment()->dict:
    env = {k: v for k, v in os.environ.items() if k != "SHELL"}
    return env | dict(PYTHONPATH=str(PACKAGE.parent), PATH=f"{Path(sys.executable).parent}:{env['PATH']}")


def as_in_a_terminal():
    "Restore default signal handlers, which `nohup` and `&` disable."
    for signum in (signal.SIGINT, signal.SIGHUP): signal.signal(signum, signal.SIG_DFL)


def start(root:Path, *command:str)->subprocess.Popen:
    return subprocess.Popen(
        command or [sys.executable, *RUN], cwd=root, env=environment(), start_new_session=True,
        preexec_fn=as_in_a_terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def alive(pid:int)->bool: return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(holds, seconds=180):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def started(root:Path)->list[int]:
    "The kernel's process and its helper's, once the stage's code runs."
    wait_for(lambda: (root/"started").exists() and len((root/"started").read_text().split()) == 2)
    return [int(pid) for pid in (root/"started").read_text().split()]


def failure(root:Path)->str: return nbformat.read(root/"papermill_runs/shards.ipynb", 4).cells[0].source


def test_output_is_live_and_a_second_report_is_equal(tmp_path):
    root = project(tmp_path, "import sys\nprint('seed', config['seed'])\nprint(50 * config['seed'], '%', file=sys.stderr)")
    first, second = (start(root).communicate() for _ in range(2))
    assert first == second
    assert first == ("seed 2\npapermill_runs/shards.ipynb\n", "100 %\n")
    report = (root/"papermill_runs/shards.ipynb").read_text()
    assert str(root) not in report and "100 %" not in report
    start(root).wait()
    assert (root/"papermill_runs/shards.ipynb").read_text() == report


def test_wrong_parameter_is_reported_in_one_line(tmp_path):
    process = start(project(tmp_path, "1", seed="two"))
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == "ai2text stage: params.yaml: shards.seed: 'two' is a str; write a int\n"


def test_failed_stage_writes_its_report(tmp_path):
    root = project(tmp_path, "print('before')", "raise KeyError('tea')", "print('after')")
    process = start(root)
    out, err = process.communicate()
    assert process.returncode == 1 and out == "before\n"
    assert err.endswith("ai2text stage: stage shards: KeyError: 'tea'; its report: papermill_runs/shards.ipynb\n")
    assert "KeyError: 'tea'" in failure(root)


def test_killed_kernel_fails_the_stage(tmp_path):
    root = project(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    process = start(root)
    assert process.wait(120) == 1
    assert "DeadKernelError" in failure(root)


@pytest.mark.parametrize("signum", [signal.SIGTERM, *too(signal.SIGINT, signal.SIGHUP)])
def test_signals_become_one_interrupt(tmp_path, signum):
    root = project(tmp_path, TRAIN)
    process = start(root)
    assert process.stdout.readline() == "training\n" # while the cell runs
    pids = started(root)
    process.send_signal(signum)
    time.sleep(0.4)
    os.killpg(process.pid, signum)
    assert process.wait(120) == 128 + signum
    assert (root/"saved").read_text() == "1"
    assert failure(root).endswith(f"interrupted by {signum.name}\n```")
    wait_for(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("cells", [["Path('next').touch()"], *too([])], ids=["before the last cell", "in the last cell"])
def test_swallowed_interrupt_stops_the_stage(tmp_path, cells):
    root = project(tmp_path, TRAIN.replace("raise KeyboardInterrupt", ""), *cells)
    process = start(root)
    started(root)
    process.terminate()
    assert process.wait(120) == 143
    assert (root/"saved").exists() and not (root/"next").exists()


def test_death_of_the_parent_interrupts_the_kernel(tmp_path):
    root = project(tmp_path, TRAIN)
    parent = start(root, sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, *{RUN}])")
    pids = started(root)
    runner = psutil.Process(pids[0]).ppid()
    parent.kill()
    wait_for(lambda: not any(map(alive, [runner, *pids])))
    assert (root/"saved").read_text() == "1"
    assert "interrupted by SIGTERM" in failure(root)


@pytest.mark.parametrize("moment", ["in its imports", *too("before its first line")])
def test_orphaned_runner_starts_no_stage(tmp_path, moment):
    root = project(tmp_path, TRAIN)
    # shadows papermill, slowly
    (root/"papermill.py").write_text("import os, pathlib, time\npathlib.Path('importing').write_text(str(os.getpid()))\ntime.sleep(600)")
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, *{RUN}])"]
    if moment == "before its first line": command = ["sh", "-c", f"DVC_STAGE=shards {sys.executable} {' '.join(RUN)} & echo $! > importing"]
    parent = start(root, *command)
    wait_for(lambda: (root/"importing").exists() and (root/"importing").read_text())
    parent.kill()
    wait_for(lambda: not alive(int((root/"importing").read_text())))
    assert not (root/"started").exists() and not (root/"papermill_runs").exists()


def test_kernel_ends_with_a_killed_runner(tmp_path):
    root = project(tmp_path, TRAIN)
    process = start(root)
    pids = started(root)
    process.kill()
    wait_for(lambda: not any(map(alive, pids)))
    assert not (root/"saved").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, *too(signal.SIGKILL)])
def test_ranks_of_a_stage_end_with_it(tmp_path, signum):
    "SIGTERM interrupts the ranks, SIGKILL leaves none."
    root = project(tmp_path, "from ai2text.core.distributed import launch\nlaunch('worker:work', {}, 2, threads=1)")
    (root/"worker.py").write_text(RANKS)
    process = start(root)
    wait_for((root/"started").exists, seconds=180)
    pids = started(root)
    process.send_signal(signum)
    assert process.wait(120) == (143 if signum == signal.SIGTERM else -signal.SIGKILL)
    wait_for(lambda: not any(map(alive, pids)))
    if signum == signal.SIGKILL: return
    assert all((root/f"saved-{rank}").exists() for rank in (0, 1))
    assert process.stderr.read().startswith("working\n") and "interrupted by SIGTERM" in failure(root)


def test_killed_dvc_interrupts_its_stage(tmp_path):
    root = project(tmp_path, TRAIN)
    (root/"dvc.yaml").write_text(f"stages:\n  shards:\n    cmd: exec python {' '.join(RUN)}\n")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=root, env=environment(), check=True)
    process = start(root, *dvc, "repro")
    pids = started(root)
    runner = psutil.Process(pids[0]).ppid()
    assert psutil.Process(runner).ppid() == process.pid # no shell between the two
    process.kill()
    wait_for(lambda: not any(map(alive, [runner, *pids])))
    assert (root/"saved").read_text() == "1"


def test_copy_of_a_project_runs_its_own_code(tmp_path):
    root = project(tmp_path, "import ai2text\nprint(ai2text.__version__)")
    shutil.copytree(PACKAGE, root/"ai2text", ignore=shutil.ignore_patterns("__pycache__", "demo"))
    (root/"ai2text/__init__.py").write_text('__version__ = "of the copy"\n')
    report = root/run_stage("shards", root=root/"nbs")
    assert "of the copy" in nbformat.read(report, 4).cells[2].outputs[0].text
