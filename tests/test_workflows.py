"Workflows refer to existing commands, have minimal permissions, and build complete archives."
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from ruamel.yaml import YAML

from ai2text.pipeline.cli import COMMANDS
from conftest import ROOT

FILES = sorted((ROOT/".github/workflows").glob("*.y*ml"))
WORKFLOWS = {path.name: YAML(typ="safe", pure=True).load(path.read_text("utf-8")) for path in FILES}
MAKEFILE = (ROOT/"Makefile").read_text("utf-8")
TARGETS = {name for line in re.findall(r"^([\w. -]+):(?!=)", MAKEFILE, re.M) for name in line.split()} - {".PHONY", ".NOTPARALLEL"}
OF_CI = set(re.findall(r"^(\w+)\(\)", (ROOT/".ci/run").read_text("utf-8"), re.M))
SETTINGS = (ROOT/"settings.ini").read_text("utf-8")
# all others are read-only
WRITES = {"pipeline.yml": {"publish": {"pages", "id-token"}}, "release.yml": {"github": {"contents"}, "pypi": {"id-token"}}}
each = pytest.mark.parametrize("name", WORKFLOWS)


def jobs(name): return WORKFLOWS[name]["jobs"].items()
def steps(name): return [step for _, job in jobs(name) for step in job["steps"]]
def scripts(name): return [step["run"] for step in steps(name) if "run" in step]


def test_workflows_exist(): assert set(WORKFLOWS) >= {"ci.yml", "pipeline.yml", "release.yml"}


@each
def test_commands_exist(name):
    for script in scripts(name):
        for words in re.findall(r"(?:^|[;&|] *)make ([\w. -]+)", script, re.M):
            assert set(words.split()) <= TARGETS, f"{name}: make {words}; the Makefile has {sorted(TARGETS)}"
        for words in re.findall(r"\.ci/run\b([\w -]*)", script):
            assert set(words.split()) <= TARGETS | OF_CI, f"{name}: .ci/run {words}; there are {sorted(TARGETS | OF_CI)}"
        for word in re.findall(r"\bai2text ([a-z]+)", script):
            assert word in COMMANDS, f"{name}: ai2text {word}; there are {sorted(COMMANDS)}"


@each
def test_scripts_are_valid_bash(name):
    for script in scripts(name):
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert not done.returncode, f"{name}: {done.stderr}"


def test_ci_runs_every_step():
    "The steps of `.ci/run`, in its order."
    default = re.search(r"set -- (.+)", (ROOT/".ci/run").read_text("utf-8"))[1].split()
    test = re.search(r"^test: (.+)$", MAKEFILE, re.M)[1].split()
    listed = [word for script in scripts("ci.yml") for words in re.findall(r"\.ci/run\b([\w -]*)", script) for word in words.split()]
    assert listed == [word for step in default for word in (test if step == "test" else [step])]


@each
def test_python_versions_are_supported(name):
    least = tuple(map(int, re.search(r"^min_python *= *(\S+)", SETTINGS, re.M)[1].split(".")))
    versions = [v for _, job in jobs(name) for v in job.get("strategy", {}).get("matrix", {}).get("python", [])]
    versions += [step["with"]["python-version"] for step in steps(name) if "actions/setup-python" in step.get("uses", "")]
    given = [v for v in versions if "matrix.python" not in str(v)]
    assert given and all(isinstance(v, str) for v in given), f"{name}: {given}: quote the version, or 3.10 is read as 3.1"
    assert all(tuple(map(int, v.split("."))) >= least for v in given), f"{name}: {given}"
    if name == "ci.yml": assert ".".join(map(str, least)) in given, "the oldest supported Python must be tested"


@each
def test_permissions_are_minimal(name):
    flow = WORKFLOWS[name]
    assert flow["permissions"] == dict(contents="read"), f"{name}: the top level must set contents: read only"
    assert "pull_request_target" not in str(flow["on"]) and flow["concurrency"]["group"]
    for job, content in jobs(name):
        writes = {k for k, v in content.get("permissions", {}).items() if v != "read"}
        assert writes == WRITES.get(name, {}).get(job, set()), f"{name}, {job}: {writes}"
        assert 0 < content["timeout-minutes"] < 360
        if writes:
            assert not any("checkout" in step.get("uses", "") or ".ci/run" in step.get("run", "") for step in content["steps"]), (
                f"{name}, {job}: a job with write permissions must not run code of the project")


@each
def test_scripts_contain_no_expressions(name):
    for script in scripts(name):
        assert "${{" not in script, f"{name}: {script!r}: pass values by env, quoted; a branch name could contain a command"
    for step in steps(name):
        if "uses" in step:
            assert re.search(r"@(v\d+(\.\d+)*|release/v\d+|[0-9a-f]{40})$", step["uses"]), f"{name}: {step['uses']} names no version"
        if "checkout" in step.get("uses", "") and name != "ci.yml": assert step["with"]["persist-credentials"] is False


@each
def test_secrets_are_limited_to_the_steps_that_need_them(name):
    for place in [WORKFLOWS[name], *(job for _, job in jobs(name))]:
        assert not any(re.search(r"secrets\.\w+ *\}\}", str(v)) for v in (place.get("env") or {}).values()), (
            f"{name}: a secret is available to all steps")
    for step in steps(name):
        secret = {k for k, v in step.get("env", {}).items() if "secrets." in str(v) or "github.token" in str(v)}
        assert not secret or "run" in step and not re.search(r"\becho\b|\bprintenv\b|\benv\b|set -\w*x", step["run"]), f"{name}: {step}"
        assert "secrets." not in str({k: v for k, v in step.items() if k != "env"}), f"{name}: {step}"


def test_reports_are_uploaded_only_for_open_data():
    "Artifacts of a public repository are public, so reports of private data must not be uploaded."
    for step in steps("pipeline.yml"):
        if "upload" in step.get("uses", "") and step["with"]["path"] != "dvc.lock": assert "env.OPEN == 'true'" in step["if"], step
    assert "outputs.open == 'true'" in WORKFLOWS["pipeline.yml"]["jobs"]["publish"]["if"]


def build(source, to):
    "Build a source archive and a wheel with the command of release.yml."
    (code,) = re.findall(r"python -c '(.+)'", "\n".join(scripts("release.yml")))
    (source/"files").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    for path in (source/"files").iterdir(): path.rename(to/path.name)


def test_source_archive_and_wheel_are_complete(tmp_path):
    "The wheel has all tracked files of the package, and the unpacked archive builds the same wheel."
    sources = "ai2text", "setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard", *sources]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [n for n in listed.stdout.split("\0") if n and (ROOT/n).is_file()]
    found = []
    for turn in ("git", "archive"):
        source, to = tmp_path/turn, tmp_path/f"{turn}-made"
        to.mkdir()
        if turn == "git":
            for name in names:
                (source/name).parent.mkdir(parents=True, exist_ok=True)
                (source/name).write_bytes((ROOT/name).read_bytes())
        else:
            with tarfile.open(next((tmp_path/"git-made").glob("*.tar.gz"))) as archive:
                archive.extractall(tmp_path/"unpacked", filter="data")
            (source,) = (tmp_path/"unpacked").iterdir()
        build(source, to)
        with zipfile.ZipFile(next(to.glob("*.whl"))) as wheel:
            found.append({n: wheel.read(n) for n in wheel.namelist() if not n.endswith("/RECORD")})
    package = {n for n in found[0] if ".dist-info/" not in n}
    assert package == {n for n in names if n.startswith("ai2text/")}, package ^ {n for n in names if n.startswith("ai2text/")}
    assert all(found[0][n] == (ROOT/n).read_bytes() for n in package)
    assert {"ai2text/demo/sentences.vi.txt", "ai2text/demo/LICENSE", "ai2text/web/index.html", "ai2text/web/report.html.j2",
            "ai2text/web/card_streaming_ctc.md", "ai2text/web/card_whisper.md", "ai2text/abbreviations.tsv", "ai2text/readings.tsv",
            "ai2text/variants.tsv"} <= package
    [entries] = [data for n, data in found[0].items() if n.endswith("entry_points.txt")]
    assert b"ai2text=ai2text.pipeline.cli:main" in entries.replace(b" ", b"")
    assert found[0] == found[1], "the archive builds a different wheel"
    (to/"x").mkdir()
    with zipfile.ZipFile(next(to.glob("*.whl"))) as wheel: wheel.extractall(to/"x")
    done = subprocess.run([sys.executable, "-c", "import ai2text.pipeline.cli as c, sys; sys.exit(c.main(['--version']))"], cwd=to/"x",
                          env={"PYTHONPATH": str(to/"x")}, capture_output=True, text=True)
    assert done.stdout.strip() == re.search(r"^version *= *(\S+)", SETTINGS, re.M)[1], done.stderr
