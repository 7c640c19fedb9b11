"Data shared through DVC and a real S3 server: who is refused, what breaks half-way, two at once, and what is gone comes back."
import hashlib
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dvc.cli
import dvc.logger
import dvc_s3  # noqa: F401 (loaded once, here, and not in each process below)
import pytest

from ai2text.faults import KEY, SECRET, Faults, bad_line

fork = multiprocessing.get_context("fork")
FILES, SIZE = 12, 100_000
CONFIG = """[core]
    remote = far
    analytics = false
['remote "far"']
    url = s3://{bucket}/dvc
    endpointurl = {url}
"""


def _dvc(arguments, folder, environment, out, limit):
    "What `dvc` does, in a fork of this process: it need not import DVC again."
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(out, "wb", 0) as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    logging.getLogger("dvc").handlers.clear()
    dvc.logger.setup()
    code = dvc.cli.main(list(arguments))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


class Machine:
    "A user with a clone, a home and a cache of its own."
    def __init__(self, home:Path, store, origin:Path=None, bucket:str="bucket"):
        self.home, self.root = home, home/"project"
        (self.root/".dvc").mkdir(parents=True)
        if origin: shutil.rmtree(self.root), self.git("clone", "-q", str(origin), str(self.root), cwd=home)
        else:
            self.git("init", "-q", "-b", "main")
            (self.root/".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
        self.remote(store.url, bucket)

    def remote(self, url, bucket="bucket", more=""): (self.root/".dvc/config").write_text(CONFIG.format(url=url, bucket=bucket) + more)

    def environment(self, **changes)->dict:
        "Nothing of this machine's own settings."
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "DVC_", "XDG_", "GIT_AUTHOR", "GIT_COMMITTER"))}
        git = {f"GIT_{who}_{what}": "someone@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        own = dict(HOME=str(self.home), DVC_SITE_CACHE_DIR=str(self.home/"site"), AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_EC2_METADATA_DISABLED="true")
        return {k: v for k, v in {**kept, **git, **own, **changes}.items() if v is not None}

    def git(self, *arguments, cwd=None):
        done = subprocess.run(["git", *arguments], cwd=cwd or self.root, env=self.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def start(self, *arguments, limit=0, **changes):
        "DVC in a process of its own."
        process = fork.Process(target=_dvc, args=(arguments, self.root, self.environment(**changes), self.home/"said", limit), daemon=True)
        process.start()
        return process

    def dvc(self, *arguments, ok=True, **how)->str:
        "Run DVC; all that it said."
        process = self.start(*arguments, **how)
        process.join()
        said = (self.home/"said").read_text()
        print(f"{self.home.name}$ dvc {' '.join(arguments)}\n{said}")
        assert (process.exitcode == 0) == ok, f"dvc {' '.join(arguments)} ended with {process.exitcode}:\n{said}"
        return said

    def write(self, seed, count=FILES, size=SIZE):
        for i in range(count):
            (self.root/"data").mkdir(exist_ok=True)
            (self.root/f"data/{seed}-{i}").write_bytes(random.Random(f"{seed} {i}").randbytes(size))

    def commit(self, name):
        "Track data/ and tag the commit."
        self.dvc("add", "-q", "data")
        self.git("add", "-A"), self.git("commit", "-qm", name), self.git("tag", name)

    def data(self)->dict: return {p.name: p.read_bytes() for p in (self.root/"data").glob("*")}
    def cache(self)->Path: return self.root/".dvc/cache"


def objects(folder:Path)->dict:
    "The objects of a cache or a remote: name -> path. All of them are what their names say."
    found = {p.parent.name + p.name: p for p in folder.rglob("*") if p.is_file() and re.fullmatch("[0-9a-f]{2}", p.parent.name)}
    wrong = [name for name, p in found.items() if hashlib.md5(p.read_bytes()).hexdigest() != name.removesuffix(".dir")]
    assert not wrong, f"corrupt: {wrong}"
    return found


@pytest.fixture
def a(store, tmp_path):
    "A machine with one commit of data, which nobody else has."
    machine = Machine(tmp_path/"a", store)
    machine.write("one")
    machine.commit("one")
    return machine


def clone(a, store, name="b", **how): return Machine(a.home.with_name(name), store, a.root, **how)
