"The commands of the front page and the tutorials exist, committed outputs are current; the model family of the tutorial passes the project's checks and trains."
import json
import re
import shlex
from pathlib import Path

import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from nbformat import write

from ai2text.pipeline.cli import _parser
from conftest import NOTEBOOKS, ROOT
from workspace import Workspace


def commands():
    "Shell lines of the front page and the tutorials that call `ai2text` or `make`: (notebook, words)."
    for notebook in (o for o in NOTEBOOKS if o.name == "index" or o.room == "tutorials"):
        for cell in notebook.raw["cells"]:
            for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", "".join(cell["source"]), flags=re.M | re.S):
                for words in (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()):
                    if words and words[0] in ("ai2text", "make"): yield notebook.name, words


def test_commands_of_the_front_page_and_the_tutorials_exist(capsys):
    targets, wrong, known = set(re.findall(r"^([a-z0-9-]+):", (ROOT/"Makefile").read_text(), flags=re.M)), [], list(commands())
    for name, (program, *words) in known:
        if program == "make" and words[0] not in targets: wrong.append(f"{name}: make {words[0]}: no such target")
        if program == "ai2text":
            try: _parser(words).parse_args(words)
            except SystemExit: wrong.append(f"{name}: ai2text {' '.join(words)}: {capsys.readouterr().err.splitlines()[-1]}")
    assert len(known) > 20 and not wrong, wrong


def shown(path):
    "The text of all outputs; a table as its HTML."
    return ["".join(o.get("text") or (o["data"].get("text/html") or o["data"]["text/plain"]))
            for c in json.loads(Path(path).read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", ())]


@pytest.mark.parametrize("name", ["models", "recordings"])
def test_committed_outputs_are_of_this_code(name, tmp_path):
    "Of the tutorials whose outputs are text that does not depend on the machine."
    papermill.execute_notebook(str(ROOT/f"nbs/tutorials/{name}.ipynb"), str(tmp_path/"now.ipynb"), progress_bar=False, cwd=str(tmp_path))
    now, then = shown(tmp_path/"now.ipynb"), shown(ROOT/f"nbs/tutorials/{name}.ipynb")
    assert now == then, f"run nbs/tutorials/{name}.ipynb again and commit its outputs"


NEW = "models/45_gru", "testing/05_family_check"


def add_family(root:Path):
    "Follow the tutorial's last section: a notebook, a line in the registry, and a small configuration for the check."
    cells = ["".join(c["source"]) for c in json.loads((ROOT/"nbs/tutorials/family.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    family, = [source for source in cells if "class Gru(" in source]
    end = "#| hide\nimport nbdev; nbdev.nbdev_export()"
    needs, test = (
        "#| hide\nfrom ai2text.text.tokenizer import CharTokenizer",
        "assert Gru.from_config(dict(width=8), CharTokenizer()).config == dict(width=8, layers=2)",
    )
    write(
        new_notebook(
            cells=[
                new_markdown_cell("# Gru\n> A bidirectional GRU."),
                new_code_cell("#| default_exp models.gru"),
                *(new_code_cell(f"#| export\n{part}") for part in split(family)),
                new_code_cell(needs),
                new_code_cell(test),
                new_code_cell(end),
            ],
            metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3")),
        ),
        root / "nbs/models/45_gru.ipynb",
    )
    for name, old, new in (
        ("models/50_registry", 'wav2vec=\\"Wav2Vec2\\")', 'wav2vec=\\"Wav2Vec2\\", gru=\\"Gru\\")'),
        ("testing/05_family_check", 'wav2vec=dict(size=\\"tiny\\"),', 'wav2vec=dict(size=\\"tiny\\"), gru=dict(width=16),'),
    ):
        path = root/f"nbs/{name}.ipynb"
        text = path.read_text()
        assert text.count(old) == 1, old
        path.write_text(text.replace(old, new))
    path = root/"nbs/sidebar.yml"
    line = "          - models/40_wav2vec.ipynb\n"
    assert line in path.read_text()
    path.write_text(path.read_text().replace(line, line + line.replace("40_wav2vec", "45_gru")))


def split(source:str)->list:
    "Imports and code as separate cells, as nbdev requires."
    lines = source.splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if line.startswith(("import ", "from ")))
    return ["".join(lines[:last + 1]).strip(), "".join(lines[last + 1:]).strip()]


@pytest.fixture(scope="module")
def home(pipeline, tmp_path_factory):
    "A workspace with the new family."
    w = Workspace.copy(pipeline, tmp_path_factory.mktemp("home"))
    add_family(w.root)
    w.run("nbdev_export")
    for name in NEW: w.run("nbdev_clean", "--fname", f"nbs/{name}.ipynb")
    assert (w.root/"ai2text/models/gru.py").is_file()
    return w


def test_family_of_the_tutorial_passes_the_checks(home):
    home.run("git", "add", "-A")
    home.run("python", "-m", "pytest", "-q", "tests/test_house.py", "-k", "gru or family or sync or required or small or sidebar", "-p", "no:cacheprovider")
    for name in NEW: home.run("nbdev_test", "--path", f"nbs/{name}.ipynb", PYTHONPATH=str(home.root))


@pytest.mark.slow
def test_pipeline_trains_the_family_of_the_tutorial(home):
    home.change(dict(models=dict(gru=dict(family="gru", width=16))))
    assert not {"corpus@demo", "prepare", "shards"} & home.repro("evaluate@gru")
    eval = json.loads((home.root/"results/gru-eval/eval.json").read_text())
    assert eval["utterances"] == 4 and json.loads((home.root/"results/gru/metrics.json").read_text())["family"] == "gru"
