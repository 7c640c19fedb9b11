"""The tests of every library notebook, run on the exported module.

nbdev_test runs the definitions in the notebook, so an import missing from an exported cell goes unnoticed. Here exported
cells are not run; their names come from the module. Coverage is therefore that of the package. Ruff finds such imports
in seconds (F821), so this test is slow and runs in `make test-all`."""
import importlib
import os
import re
import sys
from types import ModuleType

import pytest
from execnb.shell import CaptureShell

from conftest import LIBRARY, ROOT

pytestmark = pytest.mark.slow

DIRECTIVE = re.compile(r"^\s*#\|\s*(.+)$", flags=re.M)
# names that Python or IPython set in a namespace
OWN = {"__name__", "__doc__", "__package__", "__loader__", "__spec__", "__file__", "__cached__", "__builtins__"}


def directives(source):
    "The words of a cell's `#|` lines: the first one without its colon -> the rest."
    rows = [o.split(None, 1) for o in DIRECTIVE.findall(source)]
    return {row[0].rstrip(":"): row[1].strip() if len(row) > 1 else "" for row in rows}


def skipped(source, flags, config_flags=frozenset({"slow", "cuda"})):
    "Whether nbdev would not run the cell as a test, or it is exported."
    found = directives(source)
    return bool({"export", "exports", "exporti", "default_exp"} & found.keys() or found.get("eval") == "false"
                or (config_flags - flags) & found.keys() or "nbdev_export(" in source)


def test_cells_are_selected_like_nbdev_test():
    assert directives("#| export\n#|eval: false\nx = 1") == {"export": "", "eval": "false"}
    assert skipped("#| export\nx = 1", set()) and skipped("#|eval: false\nx", set()) and skipped("#| slow\nx", set())
    assert not skipped("#| slow\nx", {"slow"}) and not skipped("#| hide\nx = '#| export'", set())


@pytest.fixture
def restored(monkeypatch):
    "Restore the process after a notebook: modules, environment, path and folder."
    modules, environment = set(sys.modules), dict(os.environ)
    monkeypatch.chdir(ROOT/"nbs")
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in set(sys.modules) - modules:
        if not isinstance(sys.modules[name], ModuleType): del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("notebook", LIBRARY, ids=lambda o: o.name)
def test_notebook_on_exported_module(notebook, flags, restored, monkeypatch):
    module = importlib.import_module(f"ai2text.{notebook.module}")
    shell = CaptureShell(notebook.path, mpl_format="png")
    monkeypatch.setitem(sys.modules, "__main__", shell.user_module)
    shell.user_ns.update({k: v for k, v in vars(module).items() if k not in OWN})
    for position, source, _ in notebook.code:
        if skipped(source, flags): continue
        shell.run(source)
        if shell.exc is not None:
            pytest.fail(f"{notebook.path.name}, cell {position}, on ai2text.{notebook.module}:\n\n{source}\n\n"
                        f"{type(shell.exc).__name__}: {shell.exc}", pytrace=False)
