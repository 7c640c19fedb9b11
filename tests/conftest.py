"Shared by all tests: the list of notebooks, a finished pipeline, an S3 server, and the selection of slow tests."
import fcntl
import json
import os
import random
import re
import shutil
import socket
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
sys.modules.setdefault("rfc3987_syntax", None) # nbformat imports it; building its grammar takes seconds

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Notebook:
    "A notebook of nbs/."
    path: Path

    @property
    def name(self): return self.path.relative_to(ROOT/"nbs").with_suffix("").as_posix()

    @property
    def number(self):
        "Its number in the order of dependence, or None."
        found = re.match(r"(\d\d)_", self.path.name)
        return int(found[1]) if found else None

    @cached_property
    def raw(self): return json.loads(self.path.read_text(encoding="utf-8"))

    @cached_property
    def code(self):
        "Its code cells as (position in the notebook, source, tags)."
        cells = [(i, c) for i, c in enumerate(self.raw["cells"]) if c["cell_type"] == "code"]
        return [(i, "".join(c["source"]), c["metadata"].get("tags", [])) for i, c in cells]

    @cached_property
    def module(self):
        "The exported module, or None for a stage, a benchmark or the front page."
        names = [o for _, source, _ in self.code for o in re.findall(r"^#\|\s*default_exp\s+(\S+)", source, flags=re.M)]
        return names[0] if names else None

    @property
    def room(self):
        "Its folder; empty for the front page."
        return self.path.relative_to(ROOT/"nbs").parts[0] if self.path.parent != ROOT/"nbs" else ""


def is_hidden(path): return any(p.startswith((".", "_")) for p in path.relative_to(ROOT).parts)

NOTEBOOKS = [Notebook(o) for o in sorted((ROOT/"nbs").rglob("*.ipynb")) if not is_hidden(o)]
LIBRARY = [o for o in NOTEBOOKS if o.module]
STAGES = [o for o in NOTEBOOKS if o.name.startswith("stages/")]
RUNNABLE = [o for o in NOTEBOOKS if o.name.startswith(("stages/", "benchmarks/"))] # no stage depends on a benchmark


def pytest_addoption(parser):
    parser.addoption("--flags", default="", help='also run tests and cells with these flags, as in nbdev_test: --flags "slow cuda"')


@pytest.fixture(scope="session")
def flags(pytestconfig):
    "The requested flags of cells and tests."
    return set(pytestconfig.getoption("--flags").split())


# The longest first, so that two processes finish at about the same time. The first one makes the pipeline that others copy.
LONG = ["test_pipeline.py", "test_pipeline_kills.py", "test_stage.py", "test_replay.py", "test_export.py", "test_ranks.py",
        "test_continue_elsewhere.py", "test_tutorials.py", "test_compare.py",
        "test_trainer.py", "test_stream_from_remote.py", "test_resume.py", "test_s3.py", "test_recordings.py"]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    deselected = {"slow", "cuda"} - set(config.getoption("--flags").split())
    kept = {False: [], True: []}
    for item in items: kept[any(map(item.get_closest_marker, deselected))].append(item)
    config.hook.pytest_deselected(items=kept[True])
    items[:] = kept[False]


def too(*values):
    "Further values of a parametrized test, for `make test-all` only."
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


def free_port()->int:
    "A free port outside the range of ephemeral ports, which the system could assign before the server starts."
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 32768
    for port in random.SystemRandom().sample(range(10_000, max(first, 11_000)), 100):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try: s.bind(("127.0.0.1", port)); return port
            except OSError: continue
    raise OSError("no free port found")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    "The folder of a small workspace with a finished pipeline, made once per session. Read-only: change a `Workspace.copy`."
    from workspace import STAGES, Workspace
    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: top = top.parent
    with open(top/"pipeline.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (top/"pipeline.ran").exists():
            shutil.rmtree(top/"pipeline", ignore_errors=True)
            assert Workspace(top/"pipeline").repro() == set(STAGES)
            (top/"pipeline.ran").touch()
    return top/"pipeline"


class Store(NamedTuple):
    "A running S3 server: the folder with its buckets, its URL, and the `Server` of a client."
    folder: Path
    url: str
    server: object


@pytest.fixture
def store(tmp_path):
    "A real S3 server with an empty bucket `bucket`. Upload objects by request: files added to the folder later may not be found."
    from ai2text.testing.s3_faults import KEY, SECRET, serve_s3
    from ai2text.data.storage import Server
    (tmp_path/"store/bucket").mkdir(parents=True)
    with serve_s3(tmp_path/"store") as url: yield Store(tmp_path/"store", url, Server(url, key=KEY, secret=SECRET, timeout=5))
