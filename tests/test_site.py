"The site of reports and the documentation in a real browser: no requests to other hosts, no broken links or pictures, no scripts."
import json
import os
import re
import shutil

import pytest

from ai2text.pipeline.docs import docs
from ai2text.pipeline.site import GENERATOR, site
from conftest import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run",
    "--disable-sync", "--disable-quic"
]
HOSTILE = """<script>document.title = "owned"</script><img src=x onerror='document.title = "owned"'><svg onload='document.title = "owned"'></svg>
<a href="javascript:document.title='owned'">a</a><iframe src="https://else.invalid/"></iframe><meta http-equiv="refresh" content="0;url=https://else.invalid/">
<form action="https://else.invalid/"><button>send</button></form><img src="https://else.invalid/p.png"><p style="background:url(https://else.invalid/q.png)">w</p>"""
LOOK = """() => ({
    wide: document.documentElement.scrollWidth - innerWidth, title: document.title, text: document.body.innerText, images: document.images.length,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).length,
    dead: [...document.links].map(a => a.href).filter(h => !/^(file|https?|mailto):/.test(h)), links: [...document.links].map(a => a.href).filter(h => h.startsWith("file:")),
})"""


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        if os.environ.get("AI2TEXT_CI") == "1": pytest.fail("no Chromium on PATH: the site is not tested")
        pytest.skip("no Chromium on PATH: the site is not tested")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The site of this repository, as it is committed."
    return site(ROOT, tmp_path_factory.mktemp("site")/"pages").parent


def visit(browser, files, width=1200, scheme="light"):
    "Load each page; fails on requests to other hosts and on messages of the browser."
    context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, offline=True)
    tab, requests, messages, seen = context.new_page(), [], [], {}
    tab.set_default_timeout(120_000)
    tab.on("request", lambda r: requests.append(r.url))
    tab.on("console", lambda m: messages.append(f"{tab.url}: {m.text}"))
    tab.on("pageerror", lambda e: messages.append(f"{tab.url}: {e}"))
    for file in files:
        tab.goto(file.as_uri())
        seen[file] = tab.evaluate(LOOK)
    context.close()
    foreign = [url for url in requests if not url.startswith(("file:", "data:"))]
    assert not foreign, f"requests to other hosts: {foreign}"
    assert not messages, f"messages of the browser: {messages}"
    return seen


def test_every_page_has_working_links_and_pictures(built, browser):
    files = sorted(built.rglob("*.html"))
    seen = visit(browser, files)
    for file, page in seen.items():
        assert page["title"] and page["wide"] <= 0 and not page["broken"] and not page["dead"], (file, page)
        assert set(page["links"]) <= {f.as_uri() for f in files}, f"{file}: dead link"
    reports = [
        p.relative_to(ROOT).with_suffix(".html")
        for folder in ("papermill_runs", "compare/papermill_runs")
        for p in (ROOT / folder).rglob("*.ipynb")
    ]
    assert sorted(seen[built / "index.html"]["links"]) == sorted((built / r).as_uri() for r in reports) and len(reports) > 15, (
        "the front page links each report once"
    )
    assert sum(page["images"] for page in seen.values()) >= 40


def test_documentation_has_working_links_and_pictures(tmp_path, browser):
    "Front page, tutorials and library notebooks, also on a phone."
    front = docs(ROOT, tmp_path/"docs")
    files = sorted(front.parent.rglob("*.html"))
    listed = re.findall(r"- (\S+)\.ipynb", (ROOT/"nbs/sidebar.yml").read_text(encoding="utf-8"))
    assert sorted(f.relative_to(front.parent).with_suffix("").as_posix() for f in files) == sorted(listed)
    seen = visit(browser, files)
    for file, page in seen.items():
        assert page["title"] and page["wide"] <= 0 and not page["broken"] and not page["dead"], (file, page)
        assert set(page["links"]) <= {f.as_uri() for f in files}, f"{file}: dead link"
    assert {f.as_uri() for f in files} - {front.as_uri()} <= set(seen[front]["links"]) and seen[front]["images"] >= 3
    some = [front, front.parent/"serving/00_bundle.html", front.parent/"tutorials/plan.html"]
    for page in visit(browser, some, width=390, scheme="dark").values(): assert page["wide"] <= 0, page


def test_pages_fit_a_phone(built, browser):
    files = [built/"index.html", *sorted((built/"papermill_runs").rglob("*.html"))[:6]]
    for page in visit(browser, files, width=390, scheme="dark").values(): assert page["wide"] <= 0, page


def test_front_page_has_the_figures_of_the_result_files(built):
    text = (built/"index.html").read_text("utf-8")
    for folder in (ROOT, ROOT/"compare"):
        found = json.loads((folder/"comparison/compare.json").read_text())
        assert f"Recommended: {found['recommendation']['model']}" in text and found["recommendation"]["rule"] in text
        for m in found["models"]: assert f"{m['wer']:.1%} ({m['wer_low']:.1%} to {m['wer_high']:.1%})" in text
        for log in (folder/"results").glob("*/ttq_log.json"):
            for goal in json.loads(log.read_text())["milestones"]:
                assert re.search(rf"<td>{goal['wer']:.1%}</td><td>[^<]+</td><td>{goal['state']}", text)
    assert f"{json.loads((ROOT/'comparison/export.json').read_text())['wer']['stream']['wer']:.1%}" in text


@pytest.fixture
def workspace(tmp_path):
    "A project with one report that has hostile text in every place for text."
    root = tmp_path/"project"
    data = lambda **kinds: dict(output_type="display_data", metadata={}, data={k.replace("_", "/"): v for k, v in kinds.items()})
    outputs = [
        data(text_html=f"<table><tr><td>{HOSTILE}</td></tr></table>"), data(text_markdown=HOSTILE),
        data(application_javascript="document.title = 'owned'"), data(text_plain=HOSTILE),
        data(
            **{
                "image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'><script>document.title = 'owned'</script></svg>"
            }
        ),
        dict(output_type="stream", name="stdout", text=HOSTILE),
        dict(output_type="error", ename="E", evalue=HOSTILE, traceback=[HOSTILE]),
    ]
    cells = [
        dict(cell_type="markdown", id="failure", metadata={}, source=f"**This stage failed.**\n\n```\n{HOSTILE}\n```"),
        dict(cell_type="markdown", id="a", metadata={}, source=f"# Train {HOSTILE}\n\n> {HOSTILE}"),
        dict(
            cell_type="markdown",
            id="b",
            metadata={},
            source=f"## {HOSTILE.splitlines()[0]}\n\n[x](javascript:document.title='owned') ![x](https://else.invalid/r.png)",
        ),
        dict(cell_type="code", id="c", metadata=dict(tags=[HOSTILE]), source=HOSTILE, execution_count=None, outputs=outputs),
    ]
    (root/"papermill_runs").mkdir(parents=True)
    (root/"papermill_runs/train-m.ipynb").write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells)))
    for name in ("dvc.yaml", "params.yaml"): (root/name).write_text("{}\n")
    return root


def test_hostile_report_runs_and_loads_nothing(workspace, browser):
    index = site(workspace)
    for page in visit(browser, [index, index.parent/"papermill_runs/train-m.html"]).values():
        assert (
            "owned" not in page["title"] and not page["broken"] and not page["dead"] and all(h.endswith(".html") for h in page["links"])
        ), page
        assert "failed" in page["text"]


def test_policy_blocks_unsanitised_content(workspace, browser):
    "The same text without sanitising: the policy alone."
    bad = site(workspace).parent/"bad.html"
    bad.write_text((bad.parent/"index.html").read_text("utf-8").replace("<main>", f"<main>{HOSTILE.replace('<meta', '<xmeta')}"), "utf-8")
    context = browser.new_context(offline=True)
    tab, messages = context.new_page(), []
    tab.on("console", lambda m: messages.append(m.text))
    tab.goto(bad.as_uri())
    assert tab.title() == "ai2text: reports"
    assert sum("Content Security Policy" in line for line in messages) >= 5, messages
    context.close()


def test_same_files_give_the_same_bytes(workspace, tmp_path):
    first = site(workspace)
    shutil.copytree(workspace, tmp_path/"elsewhere", ignore=shutil.ignore_patterns("_site"))
    again = site(tmp_path/"elsewhere", tmp_path/"pages")
    for page in ("index.html", "papermill_runs/train-m.html"): assert (again.parent/page).read_bytes() == (first.parent/page).read_bytes()
    assert f'content="{GENERATOR}"' in again.read_text("utf-8") and str(tmp_path) not in again.read_text("utf-8")
    (workspace/"papermill_runs/train-m.ipynb").write_text("{")
    with pytest.raises(ValueError, match="train-m.ipynb: cannot be read as JSON"): site(workspace)
    assert first.read_bytes() == again.read_bytes(), "an error leaves the old site unchanged"
