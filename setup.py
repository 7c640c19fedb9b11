"Package metadata: everything is read from settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = here/"README.md"


def lines(key):
    "The non-empty lines of a setting that holds one requirement or entry point a line."
    return [o.strip() for o in cfg[key].splitlines() if o.strip()]


setup(
    name="ai2text",
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=["ai2text", "ai2text.*"]),
    package_data={"ai2text": ["demo/*", "*.tsv", "*.jsonl", "web/*", "matplotlibrc"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={"cluster": lines("cluster_requirements"), "hub": lines("hub_requirements"), "bench": lines("bench_requirements"),
                    "dev": [o for extra in ("cluster", "hub", "bench", "dev") for o in lines(f"{extra}_requirements")]},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["ai2text=ai2text._modidx:d"]},
    zip_safe=False,
)
