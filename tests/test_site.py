"The site of reports in a real browser: nothing from elsewhere, nothing broken, nothing that runs."
import functools
import json
import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import pytest

from ai2text.pipeline.site import GENERATOR, POLICY, site
from conftest import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync", "--disable-quic"]
HOSTILE = """<script>document.title = "owned"</script><img src=x onerror='document.title = "owned"'><svg onload='document.title = "owned"'></svg>
<a href="javascript:document.title='owned'">a</a><iframe src="https://else.invalid/"></iframe><meta http-equiv="refresh" content="0;url=https://else.invalid/">
<form action="https://else.invalid/"><button>send</button></form><img src="https://else.invalid/p.png"><p style="background:url(https://else.invalid/q.png)">w</p>"""


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


class Page(HTMLParser):
    "What a page names: its identifiers, links, sources, tables."
    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.sources, self.tables, self.depth, self.headings, self.tags = path, [], [], [], [], [], [], Counter()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags[tag] += 1
        if "id" in given: self.ids.append(given["id"])
        if tag == "a" and "href" in given: self.links.append(given["href"])
        if "src" in given: self.sources.append((tag, given["src"], given.get("alt")))
        if tag == "table": self.depth.append(0)
        if tag == "th" and self.depth: self.depth[-1] += 1
        if re.fullmatch("h[1-6]", tag): self.headings.append(int(tag[1]))
        assert not [name for name in given if name.startswith("on")], f"{self.path}: {tag} {given}"

    def handle_endtag(self, tag):
        if tag == "table": self.tables.append(self.depth.pop())


parsed = functools.cache(Page)

LOOK = """() => ({
    wide: document.documentElement.scrollWidth - innerWidth, images: document.images.length,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
    title: document.title, heading: [...document.querySelectorAll("h1")].map(h => h.textContent),
    unnamed: [...document.querySelectorAll("svg[role=img], [role=region], nav")].filter(e => !e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby")).length,
})"""


def visit(browser, files, width=1200, scheme="light", **settings):
    "What the browser sees of each page; nothing asked elsewhere, nothing complained of."
    context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, offline=True, **settings)
    tab, requests, complaints, seen = context.new_page(), [], [], {}
    tab.set_default_timeout(120_000)
    tab.on("request", lambda r: requests.append(r.url))
    tab.on("console", lambda m: complaints.append(f"{tab.url}: {m.text}"))
    tab.on("pageerror", lambda e: complaints.append(f"{tab.url}: {e}"))
    for file in files:
        tab.goto(file.as_uri())
        seen[file] = tab.evaluate(LOOK)
    context.close()
    foreign = [url for url in requests if not url.startswith(("file:", "data:"))]
    assert not foreign, f"pages asked elsewhere: {foreign}"
    assert not complaints, f"the browser complained: {complaints}"
    return seen


def test_every_page_in_a_browser(built, browser):
    files = sorted(built.rglob("*.html"))
    seen = visit(browser, files)
    for file, page in seen.items():
        assert not page["broken"] and not page["unnamed"], (file, page)
        assert page["title"] and len(page["heading"]) == 1 and page["wide"] <= 0, (file, page)
    assert sum(page["images"] for page in seen.values()) >= 40
    assert len({page["title"] for page in seen.values()}) >= len(seen) - 2 # two pipelines have a comparison


def test_phone_and_dark(built, browser):
    some = [built/"index.html", *sorted((built/"papermill_runs").glob("*.html"))[:3], *sorted((built/"papermill_runs/benchmarks").glob("*.html"))[:3]]
    for page in visit(browser, some, width=390, scheme="dark").values(): assert page["wide"] <= 0, page


def test_every_report_is_there_and_reachable(built):
    reports = [p.relative_to(ROOT).with_suffix(".html").as_posix() for folder in ("papermill_runs", "compare/papermill_runs") for p in (ROOT/folder).rglob("*.ipynb")]
    pages = {p.relative_to(built).as_posix() for p in built.rglob("*.html")}
    assert pages == {"index.html", *reports} and len(reports) > 15
    links = [link for link in Page(built/"index.html").links if not link.startswith("#")]
    assert sorted(links) == sorted(reports), "the front page has each report once"


def test_links_tables_and_headings(built):
    for path in sorted(built.resolve().rglob("*.html")):
        page = parsed(path)
        assert len(page.ids) == len(set(page.ids)), f"{path}: {page.ids}"
        for link in page.links:
            if re.match("https?://|mailto:", link): continue
            file, _, part = link.partition("#")
            target = (path.parent/file).resolve() if file else path
            assert target.is_file() and target.is_relative_to(built.resolve()), f"{path}: {link} leads nowhere"
            if part: assert part in parsed(target).ids, f"{path}: {link} leads nowhere"
        assert all(source.startswith("data:") for _, source, _ in page.sources), path
        assert all(alt for tag, _, alt in page.sources if tag == "img"), f"{path}: a picture without words"
        assert not page.depth and all(page.tables), f"{path}: a table has no heads: {page.tables}"
        assert page.headings[0] == 1 and page.headings.count(1) == 1, f"{path}: {page.headings}"
        assert page.tags["script"] == page.tags["iframe"] == page.tags["form"] == page.tags["object"] == 0
        text = path.read_text("utf-8")
        assert f'http-equiv="Content-Security-Policy" content="{POLICY}"' in text and str(ROOT) not in text


def test_front_page_says_what_the_files_say(built):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", (built/"index.html").read_text("utf-8")))
    for folder in (ROOT, ROOT/"compare"):
        found = json.loads((folder/"comparison/compare.json").read_text())
        assert f"Recommended: {found['recommendation']['model']} , by the rule {found['recommendation']['rule']}" in text
        for doubt in found["recommendation"]["doubts"]: assert doubt in text
        for m in found["models"]: assert f"{100*m['wer']:.1f}% ({100*m['wer_low']:.1f} to {100*m['wer_high']:.1f}%)" in text.replace("( ", "(")
        for log in (folder/"results").glob("*/ttq_log.json"):
            for goal in json.loads(log.read_text())["milestones"]: assert f"{100*goal['wer']:g}% {goal['state']}" in text
    export = json.loads((ROOT/"comparison/export.json").read_text())
    assert f"as a stream {100*export['wer']['stream']['wer']:.1f}%" in text


def notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell_type="markdown", metadata={}, source=c) if isinstance(c, str) else dict(cell_type="code", metadata={}, source=c[0], outputs=list(c[1:])) for c in cells]
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells)))


@pytest.fixture
def workspace(tmp_path):
    "A project with one report whose text is hostile, and one run that was cut off."
    root = tmp_path/"project"
    data = lambda **kinds: dict(output_type="display_data", metadata={}, data={k.replace("_", "/"): v for k, v in kinds.items()})
    notebook(root/"papermill_runs/train-m.ipynb", f"# Train {HOSTILE.splitlines()[0]}\n\n> {HOSTILE}", HOSTILE, f"## {HOSTILE.splitlines()[0]}\n\n[x](javascript:document.title='owned') ![x](https://else.invalid/r.png)",
             (HOSTILE, data(text_html=f"<table><tr><th>heard</th></tr><tr><td>{HOSTILE}</td></tr></table>"), data(text_markdown=HOSTILE), data(application_javascript="document.title = 'owned'"), data(text_plain=HOSTILE),
              data(**{"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'><script>document.title = 'owned'</script></svg>"}), dict(output_type="stream", name="stdout", text=HOSTILE),
              dict(output_type="error", ename="E", evalue=HOSTILE, traceback=[HOSTILE])))
    (root/"results/m").mkdir(parents=True)
    (root/"results/m/ttq_log.json").write_text(json.dumps(dict(milestones=[dict(wer=.5, budget_hours=2., state=HOSTILE, confirmed=False)], finished=False, reason=HOSTILE, history=[], about=dict(processor=HOSTILE), totals=dict(elapsed_hours=.1, best_wer=None))))
    for name in ("dvc.yaml", "params.yaml"): (root/name).write_text("models: {}\n")
    return root


def test_hostile_report_does_nothing(workspace, browser):
    index = site(workspace)
    files = [index, index.parent/"papermill_runs/train-m.html"]
    for page in visit(browser, files).values(): assert "owned" not in page["title"].replace(HOSTILE.splitlines()[0], "") and not page["broken"]
    seen = Page(files[1])
    assert all(source.startswith("data:image/") for _, source, _ in seen.sources) and not any("javascript" in link for link in seen.links)
    assert "failed" in index.read_text() and "not finished" in index.read_text()


def test_policy_stops_what_cleaning_would_miss(workspace, browser):
    "The same text put into a page as it is: the policy alone."
    index = site(workspace)
    text = index.read_text("utf-8")
    bad = index.parent/"bad.html"
    bad.write_text(text.replace('<main id="main">', f'<main id="main">{HOSTILE.replace("<meta", "<xmeta")}'), "utf-8")
    context = browser.new_context(offline=True)
    tab, told = context.new_page(), []
    tab.on("console", lambda m: told.append(m.text))
    tab.goto(bad.as_uri())
    assert tab.title() == "ai2text: reports"
    assert sum("Content Security Policy" in line for line in told) >= 5, told
    context.close()


def test_same_files_same_bytes(workspace, tmp_path):
    first = site(workspace).read_bytes()
    shutil.copytree(workspace, tmp_path/"elsewhere", ignore=shutil.ignore_patterns("_site"))
    again = site(tmp_path/"elsewhere", tmp_path/"pages")
    assert again.read_bytes() == first and again.with_name("papermill_runs").joinpath("train-m.html").read_bytes() == (workspace/"_site/papermill_runs/train-m.html").read_bytes()
    assert GENERATOR in again.read_text()
    (tmp_path/"thesis").mkdir(); (tmp_path/"thesis/index.html").write_text("years of work")
    with pytest.raises(ValueError, match="thesis: is no site"): site(workspace, tmp_path/"thesis")
    (workspace/"papermill_runs/train-m.ipynb").write_text("{")
    with pytest.raises(ValueError, match="train-m.ipynb: cannot be read as JSON"): site(workspace)
    assert (workspace/"_site/index.html").read_bytes() == first, "an error leaves the old site"
