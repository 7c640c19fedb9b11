"Conventions of the project, checked in seconds: import order, export, clean notebooks, pins, no paths of a machine."
import ast
import configparser
import filecmp
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from execnb.nbio import dict2nb, nb2str
from nbdev.clean import clean_nb
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from conftest import LIBRARY, NOTEBOOKS, ROOT, RUNNABLE, STAGES

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda o: o.name)
each_stage = pytest.mark.parametrize("notebook", STAGES, ids=lambda o: o.name)
each_runnable = pytest.mark.parametrize("notebook", RUNNABLE, ids=lambda o: o.name)


def tree(source):
    "The syntax tree of a cell without magics and shell lines."
    return ast.parse("\n".join(o for o in source.splitlines() if not re.match(r"\s*[%!]", o)))


def imports(source):
    "The dotted names of the modules that a cell imports; relative ones are of ai2text."
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import): yield from (o.name for o in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(o for o in ("ai2text" if node.level else "", node.module or "") if o)
            yield from (f"ai2text.{o.name}" for o in node.names) if base == "ai2text" else (base,)


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def requirements(*keys): return [Requirement(o) for key in keys for o in settings()[key].splitlines() if o.strip()]


def tracked():
    "The text files that git has or would add, with their text."
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        path = ROOT/name
        if not name or not path.is_file(): continue
        data = path.read_bytes()
        if b"\0" not in data: yield name, data.decode("utf-8")


def run_python(code):
    "The output of `code` in a new interpreter."
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Rooms

ROOMS = "core text audio corpora data models decoding ttq evaluation training streams protocols serving pipeline testing".split()
EXTRA = ["stages", "benchmarks", "tutorials"]                      # folders of notebooks that export nothing
PLACE = {o.module: (ROOMS.index(o.room), o.number) for o in LIBRARY if o.room in ROOMS and o.number is not None}


def own_imports(source):
    "The modules of ai2text that a cell imports, as room.name, with their lines."
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            is_module = node.module in {f"ai2text.{m}" for m in PLACE}
            names = [node.module or ""] if is_module else [f"{node.module}.{a.name}" for a in node.names]
        else: continue
        yield from ((o.removeprefix("ai2text."), node.lineno) for o in names if o.startswith("ai2text.") and o != "ai2text.__version__")


@each_notebook
def test_notebook_is_in_a_room(notebook):
    if notebook.name == "index": return
    assert notebook.room in ROOMS + EXTRA, f"nbs/{notebook.name}.ipynb is in no room; move it to one of {', '.join(ROOMS + EXTRA)}"
    if notebook.room in EXTRA: assert not notebook.module, f"{notebook.name}: exports {notebook.module}; move importable code to a room"
    else:
        assert re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", notebook.path.stem), (
            f"{notebook.name}: rename it to NN_name, with its number in the room")
        wanted = f"{notebook.room}.{notebook.path.stem[3:]}"
        assert notebook.module == wanted, f"{notebook.name}: exports {notebook.module}; write #| default_exp {wanted}"


def test_numbers_are_unique_in_a_room():
    by_number = defaultdict(list)
    for o in LIBRARY: by_number[o.room, o.number].append(o.name)
    twice = [(room, n, names) for (room, n), names in by_number.items() if len(names) > 1]
    assert not twice, "; ".join(f"{room}: two notebooks have the number {n:02}: {', '.join(names)}; "
                                "choose a free number for one" for room, n, names in twice)


def test_rooms_are_small():
    full = {room: n for room, n in Counter(o.room for o in LIBRARY).items() if n > 12}
    assert not full, f"{full}: split rooms with more than twelve notebooks"


def later(notebook):
    "The imports of a library notebook from later notebooks, as messages."
    here = PLACE[notebook.module]
    for i, source, _ in notebook.code:
        exported = re.search(r"^#\|\s*export\b", source, flags=re.M)
        for module, line in own_imports(source):
            if module not in PLACE: yield f"cell {i}, line {line}: {module} is exported by no notebook; import the module that defines it"
            elif module.startswith("testing.") and (not exported or notebook.room == "testing"): continue # allowed in tests
            elif PLACE[module] >= here and module != notebook.module:
                yield f"cell {i}, line {line}: {module} comes later; move the code down, or its dependency up"


@pytest.mark.parametrize("notebook", [o for o in LIBRARY if o.module in PLACE], ids=lambda o: o.name)
def test_notebook_imports_only_earlier_notebooks(notebook):
    wrong = list(later(notebook))
    assert not wrong, f"nbs/{notebook.name}.ipynb: " + "; ".join(wrong)


def test_an_import_of_a_later_notebook_is_reported(tmp_path):
    from conftest import Notebook
    def of(stem, text):
        class Written(Notebook):
            room, number, module = stem.split("/")[0], int(stem.split("/")[1][:2]), f"{stem.split('/')[0]}.{stem.split('/')[1][3:]}"
            code = [(4, text, [])]
        return Written(tmp_path/"x.ipynb")
    audio, late = next(o for o in LIBRARY if o.module == "audio.fbank"), "comes later; move the code down, or its dependency up"
    assert list(later(of(audio.name, "#| export\nfrom ai2text.training.setup import set_up"))) == [f"cell 4, line 2: training.setup {late}"]
    assert list(later(of(audio.name, "#| export\nfrom ai2text.audio.augment import spec_augment"))) == [
        f"cell 4, line 2: audio.augment {late}"
    ]
    smoke = "from ai2text.testing.workspace import smoke"
    assert list(later(of(audio.name, f"#| export\n{smoke}"))) == [f"cell 4, line 2: testing.workspace {late}"]
    assert list(later(of(audio.name, smoke))) == []
    assert "audio.none.x is exported by no notebook" in list(later(of(audio.name, "from ai2text.audio.none import x")))[0]


def test_only_tests_import_the_room_testing():
    library = [o for o in (ROOT/"ai2text").rglob("*.py") if o.parent.name != "testing"]
    using = [f"{o.relative_to(ROOT)}: {module}" for o in library for module, _ in own_imports(absolute(o)) if module.startswith("testing.")]
    assert not using, f"{using}: only tests may import ai2text.testing"
    for notebook in STAGES:
        cells = [source for _, source, _ in notebook.code if any(m.startswith("testing.") for m, _ in own_imports(source))]
        assert all(m == "testing.workspace" for source in cells for m, _ in own_imports(source) if m.startswith("testing.")), (
            f"{notebook.name}: a stage may import testing.workspace only")


def absolute(path):
    "The code of a module with absolute imports."
    parts = path.relative_to(ROOT).parts[:-1]
    return re.sub(r"(?m)^(\s*from )(\.+)([\w.]*) import",
                  lambda m: f"{m[1]}{'.'.join([*parts[:len(parts) - len(m[2]) + 1], *filter(None, [m[3]])])} import",
                  path.read_text("utf-8"))


# Public names that several modules define, with the reason.
SHARED_NAMES = {"SIZES": "each model family has its own, with the same meaning",
                "BLANK_ID": "decoders do not import torch, as `models.ctc` does; a test compares the two"}


def test_public_names_are_unique():
    found = defaultdict(list)
    for path in sorted((ROOT/"ai2text").rglob("*.py")):
        if path.name == "_modidx.py": continue
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in node.value.elts: found[name.value].append(".".join(path.relative_to(ROOT/"ai2text").with_suffix("").parts))
    twice = {name: where for name, where in found.items() if len(where) > 1 and name not in SHARED_NAMES}
    assert not twice, f"{twice}: rename one, make it private, or give the reason in SHARED_NAMES"


@each_stage
def test_stage_imports_and_calls_only_ai2text(notebook):
    others = {o for _, source, _ in notebook.code for o in imports(source) if o.split(".")[0] != "ai2text"}
    assert not others, f"{notebook.name} imports {others}: a stage imports from ai2text only"
    defined = [node.name for _, source, _ in notebook.code for node in ast.walk(tree(source))
               if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    assert not defined, f"{notebook.name} defines {defined}: move them to the module of the stage"


@each_runnable
def test_stage_or_benchmark_has_one_parameters_cell(notebook):
    cells = [source for _, source, tags in notebook.code if "parameters" in tags]
    assert len(cells) == 1, f"{notebook.name}: {len(cells)} cells are tagged parameters"
    for node in tree(cells[0]).body:
        assert isinstance(node, ast.AnnAssign) and node.value is not None, f"line {node.lineno} is not `name: type = value  # description`"
        assert "#" in cells[0].splitlines()[node.end_lineno-1], f"{node.target.id} has no comment: describe it"
    assert notebook.code[0][1] == cells[0], "the parameters cell must be the first code cell"
    assert not notebook.module and not any("nbdev_export(" in source for _, source, _ in notebook.code), (
        "a stage or benchmark exports nothing")


# Notebooks and export

@each_notebook
def test_notebook_is_clean(notebook):
    cfg = settings()
    nb = dict2nb(json.loads(notebook.path.read_text(encoding="utf-8")))
    clean_nb(nb, allowed_cell_metadata_keys=cfg["allowed_cell_metadata_keys"].split())
    assert notebook.path.read_text(encoding="utf-8") == nb2str(nb), f"run: nbdev_clean --fname {notebook.path.relative_to(ROOT)}"


@pytest.mark.parametrize("notebook", LIBRARY, ids=lambda o: o.name)
def test_imports_have_their_own_cells(notebook):
    "The documentation runs cells with imports, and exported cells only."
    mixed = [i for i, source, _ in notebook.code if not re.match(r"#\|\s*(export|default_exp)", source) and "nbdev_export(" not in source
             and any(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.walk(tree(source)))
             and any(not isinstance(o, (ast.Import, ast.ImportFrom, ast.Expr)) for o in tree(source).body)]
    assert not mixed, f"{notebook.name}: cells {mixed} mix imports with other code: move the imports to their own cell"


@each_runnable
def test_stage_or_benchmark_is_committed_without_outputs(notebook):
    full = [i for i, c in enumerate(notebook.raw["cells"]) if c.get("outputs")]
    assert not full, f"{notebook.name}: cells {full} have outputs; outputs belong in papermill_runs/"


@each_notebook
def test_notebook_opens_with_title_and_summary(notebook):
    first = notebook.raw["cells"][0]
    assert first["cell_type"] == "markdown" and re.match(r"# .+\n+> .+", "".join(first["source"])), (
        f"{notebook.name}: start with `# Title` and a `> summary` line")


def test_export_is_in_sync(tmp_path):
    "A new export of all notebooks equals the package."
    for name in ("settings.ini", "pyproject.toml", "setup.py"): shutil.copy(ROOT/name, tmp_path)
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path/"ai2text").mkdir()
    done = subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = lambda folder: {o.relative_to(folder).as_posix() for o in folder.rglob("*.py")}
    here, fresh = names(ROOT/"ai2text"), names(tmp_path/"ai2text")
    assert here == fresh, (
        f"only in the package: {here-fresh}; only in the notebooks: {fresh-here}; run nbdev_export, remove modules without a notebook")
    _, different, failed = filecmp.cmpfiles(ROOT/"ai2text", tmp_path/"ai2text", sorted(here), shallow=False)
    assert not different+failed, f"{different+failed} differ from the notebooks: run nbdev_export"
    assert (tmp_path/"pyproject.toml").read_text() == (ROOT/"pyproject.toml").read_text()


# Requirements

def not_required(sources, *keys):
    "The imports of `sources` (where, code) without a requirement in settings.ini."
    known = {canonicalize_name(o.name) for o in requirements(*keys)}
    homes = importlib.metadata.packages_distributions()
    own = {"ai2text", *(o.stem for o in (ROOT/"tests").glob("*.py"))}
    return {f"{where}: {name}" for where, code in sources for name in imports(code)
            if (top := name.split(".")[0]) not in own | sys.stdlib_module_names
            and not {canonicalize_name(o) for o in homes.get(top, [top])} & known}


def test_every_import_is_required():
    python = {folder: [(o.name, o.read_text(encoding="utf-8")) for o in (ROOT/folder).rglob("*.py")] for folder in ("ai2text", "tests")}
    cells = [(o.name, source) for o in NOTEBOOKS for _, source, _ in o.code]
    library = "requirements", "cluster_requirements", "hub_requirements"
    assert not (missing := not_required(python["ai2text"], *library)), f"settings.ini's requirements lack {sorted(missing)}"
    missing = not_required(python["tests"] + cells, *library, "dev_requirements", "bench_requirements")
    assert not missing, f"settings.ini lacks {sorted(missing)}"


def pins():
    "The pins of constraints.txt by name; two if an older Python has an older version."
    found = {}
    for line in (ROOT/"constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"): continue
        assert re.fullmatch(r'[A-Za-z0-9._-]+==[^ ;@]+( ; python_(full_)?version '
                            r'(<|>=) "3\.\d+(\.\d+)?")?', line), f"constraints.txt: {line!r} is not a plain pin"
        pin = Requirement(line)
        found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


@pytest.mark.parametrize("requirement", requirements("requirements", "cluster_requirements", "hub_requirements", "dev_requirements"),
                         ids=lambda o: o.name)
def test_requirement_is_pinned_and_installed(requirement):
    found = pins().get(canonicalize_name(requirement.name), [])
    assert found, f"constraints.txt does not pin {requirement.name}"
    here = lambda o: not o.marker or o.marker.evaluate()
    for pin in found:
        version = next(iter(pin.specifier)).version
        assert requirement.specifier.contains(version), f"{pin} is outside of settings.ini's {requirement}"
        if here(requirement) and here(pin):
            assert pin.specifier.contains(installed := importlib.metadata.version(requirement.name)), (
                f"{installed} is installed, not {pin}; run make setup")


def test_pins_are_of_the_oldest_python_that_they_are_for():
    required = {(canonicalize_name(d.metadata["Name"]), d.version): d.metadata["Requires-Python"] for d in importlib.metadata.distributions()}
    wrong = []
    for name, lines in pins().items():
        for pin in lines:
            oldest = re.search(r'>= "([\d.]+)"', str(pin.marker)) # else the oldest of all
            oldest = oldest[1] if oldest else importlib.metadata.metadata("ai2text")["Requires-Python"].removeprefix(">=")
            python = required.get((name, next(iter(pin.specifier)).version))
            if python and not SpecifierSet(python).contains(oldest + ".0"*(oldest.count(".") == 1)): wrong.append(f"{pin}: needs Python {python}")
    assert not wrong


def test_torch_and_torchaudio_have_one_version():
    assert pins()["torch"][0].specifier == pins()["torchaudio"][0].specifier


HEAVY = {"torch", "torchaudio", "numpy", "matplotlib", "papermill", "IPython", "nbdev", "dvc", "webdataset", "sentencepiece"}


def test_import_is_light():
    loaded = run_python("import sys, ai2text; print(*{o.split('.')[0] for o in sys.modules})")
    assert not HEAVY & set(loaded.split()), "import ai2text loads heavy packages"


@pytest.mark.skipif(not any(o.module == "pipeline.cli" for o in LIBRARY), reason="no command line")
def test_help_is_light():
    loaded = run_python("""
import contextlib, io, sys
from ai2text.pipeline.cli import main
sys.argv = ["ai2text", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as out:
    try: main()
    except SystemExit as e: assert not e.code, e.code
assert "stage" in out.getvalue(), out.getvalue()
print(*{o.split('.')[0] for o in sys.modules})""")
    assert not HEAVY & set(loaded.split()), "ai2text --help loads heavy packages"


# Repository

MACHINE = re.compile(r"(?<![\w.:/~$}-])/(?:home|Users|root|work|mnt|workspace)/[\w.-]+")


def test_no_machine_paths():
    found = [f"{name}: {hit[0]}" for name, text in tracked() for hit in MACHINE.finditer(text)]
    assert not found, f"paths of one machine: {found}; use relative paths"


def test_reports_are_small():
    "Reports in git are under 1 MB."
    big = [f"{o.name}: {o.stat().st_size} bytes" for o in (ROOT/"papermill_runs").rglob("*.ipynb") if o.stat().st_size >= 1_000_000]
    assert not big, f"reports of 1 MB and more: {big}"


def test_sidebar_has_every_page():
    "The pages of the site: front page, tutorials and library; stages and benchmarks are reports."
    listed = re.findall(r"- (\S+)\.ipynb", (ROOT/"nbs/sidebar.yml").read_text(encoding="utf-8"))
    pages = [o.name for o in NOTEBOOKS if o.room not in ("stages", "benchmarks")]
    assert sorted(listed) == sorted(pages), (
        f"nbs/sidebar.yml: add {sorted(set(pages) - set(listed))}, remove {sorted(set(listed) - set(pages))}")


def test_readme_is_the_front_page():
    from nbconvert import MarkdownExporter
    text, resources = MarkdownExporter().from_filename(str(ROOT/"nbs/index.ipynb"))
    assert not resources["outputs"], "link pictures of the front page from nbs/images"
    assert (ROOT/"README.md").read_text(encoding="utf-8").strip() == re.sub(r"\]\((images|tutorials)/", r"](nbs/\1/", text).strip(), (
        "run: make README.md")
    links = re.findall(r"\]\(([^):]+)\)", text)
    assert links and not (dead := [name for name in links if not (ROOT/"nbs"/name).is_file()]), (
        f"nbs/index.ipynb links to missing files under nbs/: {dead}")
