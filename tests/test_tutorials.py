"The family of the tutorial, moved into a copy of the house as the tutorial says: the house's rules hold, and the pipeline trains it."
import json
import sys
from pathlib import Path

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from nbformat import write

from conftest import ROOT
from workspace import Workspace


def moved_in(root:Path):
    "What the tutorial's last section asks for: a notebook, a line, and its small one for the check."
    cells = ["".join(c["source"]) for c in json.loads((ROOT/"nbs/tutorials/family.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    family, = [source for source in cells if "class Gru(" in source]
    end = "#| hide\nimport nbdev; nbdev.nbdev_export()"
    needs, test = "#| hide\nfrom ai2text.text.tokenizer import CharTokenizer", "assert Gru.from_config(dict(width=8), CharTokenizer()).config == dict(width=8, layers=2)"
    write(new_notebook(cells=[new_markdown_cell("# Gru\n> Forwards and backwards."), new_code_cell("#| default_exp gru"), *(new_code_cell(f"#| export\n{part}") for part in split(family)),
                              new_code_cell(needs), new_code_cell(test), new_code_cell(end)], metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3"))), root/"nbs/66_gru.ipynb")
    house = root/"nbs/70_family.ipynb"
    text = house.read_text()
    for old, new in (('wav2vec=\\"Wav2Vec2\\")', 'wav2vec=\\"Wav2Vec2\\", gru=\\"Gru\\")'), ('wav2vec=dict(size=\\"tiny\\"))', 'wav2vec=dict(size=\\"tiny\\"), gru=dict(width=16))'), ("whisper, wav2vec\\\")", "whisper, wav2vec, gru\\\")")):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    house.write_text(text)


def split(source:str)->list:
    "Imports apart from what they are for, as nbdev wants it."
    lines = source.splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if line.startswith(("import ", "from ")))
    return ["".join(lines[:last + 1]).strip(), "".join(lines[last + 1:]).strip()]


def test_the_family_of_the_tutorial_moves_in(tmp_path):
    home = Workspace(tmp_path)
    moved_in(tmp_path)
    bin = f"{Path(sys.executable).parent}/"
    for command in ("nbdev_export", "nbdev_clean"): home.run(bin + command)
    assert (tmp_path/"ai2text/gru.py").is_file()
    home.run("git", "add", "-A")
    home.run(bin + "python", "-m", "pytest", "-q", "tests/test_house.py", "-k", "gru or family or sync or import", "-p", "no:cacheprovider")
    for name in ("66_gru", "70_family"): home.run(bin + "nbdev_test", "--path", f"nbs/{name}.ipynb", PYTHONPATH=str(tmp_path))
    home.change(dict(models=dict(gru=dict(family="gru", width=16))))
    home.repro("evaluate@gru")
    eval = json.loads((tmp_path/"results/gru-eval/eval.json").read_text())
    assert eval["utterances"] == 4 and json.loads((tmp_path/"results/gru/metrics.json").read_text())["family"] == "gru"
