"""Builds the guides and the API reference as one static, searchable site; `docs.sh` calls it.

python launch/docs.py --out=DIR [--overwrite]

The guides are README.md, docs/, CONTRIBUTING.md and CHANGELOG.md. The reference has a page for each
public module of the package, from its docstrings, and one for each recipe, which is its source.
"""

import argparse
import logging
import os
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.commands.build import build as build_site
from mkdocs.config import load_config

from blip2_jax.runtime import outputs

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "launch" / "docs"
# What is not under docs/ in the repository -> its page in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))|(?<=src=\")[^\"]+(?=\")")


def build(out: Path) -> None:
    """Writes the site.

    Args:
      out: the folder, made if need be; `index.html` in it is the README.

    Raises:
      mkdocs.exceptions.Abort: a link or an anchor leads nowhere, or a docstring cannot be read.
    """
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder)
        shutil.copytree(ROOT / "docs", pages, dirs_exist_ok=True)
        shutil.copy(CONFIG / "style.css", pages)
        for path in guides():
            text = _with_links_of_the_site(path)
            (pages / _page_of(path.relative_to(ROOT).as_posix())).write_text(text, encoding="utf-8")
        config = load_config(
            str(CONFIG / "mkdocs.yml"),
            docs_dir=str(pages),
            site_dir=str(out),
            strict=True,
            nav=[
                {"Guides": [_page_of(path.relative_to(ROOT).as_posix()) for path in guides()]},
                {"API reference": _write_reference("blip2_jax", pages)},
                {"Recipes": _write_reference("configs", pages)},
            ],
        )
        build_site(config)


def guides() -> list[Path]:
    """The README, the pages that it lists under its last heading, in their order, and the rest."""
    readme = ROOT / "README.md"
    pages = re.findall(r"^\| \[(docs/\w+\.md)\]", readme.read_text(encoding="utf-8"), re.M)
    others = [ROOT / name for name in PAGES if name != readme.name]
    return [readme, *(ROOT / page for page in pages), *others]


def _page_of(name: str) -> str:
    """The site's page for a file of the repository, e.g. `reference/configs/stage1.md`."""
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if (ROOT / name).is_dir():
        name = f"{name}/__init__.py"
    return "reference/" + re.sub(
        r"(/__init__)?\.py$", lambda m: "/index.md" if m[1] else ".md", name
    )


def _with_links_of_the_site(path: Path) -> str:
    """A page whose links to files of the repository lead to their pages in the site."""

    def page(link: re.Match[str]) -> str:
        target, anchor, place = link[0].partition("#")
        if "://" in target or not target:
            return link[0]
        file = posixpath.normpath(posixpath.join(path.parent.relative_to(ROOT).as_posix(), target))
        return _page_of(file) + anchor + place

    return LINK.sub(page, path.read_text(encoding="utf-8"))


def _write_reference(package: str, pages: Path) -> list[Any]:
    """Writes a page for each public module of a folder; returns their order for the navigation."""
    nav: list[Any] = []
    for path in sorted((ROOT / package).iterdir(), key=lambda path: (path.is_dir(), path.name)):
        name = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            inner = _write_reference(name, pages) if list(path.glob("*.py")) else []
            nav += [{path.name: inner}] if inner else []
        elif path.suffix == ".py" and (path.name == "__init__.py" or path.name[0] != "_"):
            text = _page_of_recipe(path) if name.startswith("configs/") else _page_of_module(name)
            if text:
                page = _page_of(name)
                (pages / page).parent.mkdir(parents=True, exist_ok=True)
                (pages / page).write_text(text, encoding="utf-8")
                nav.append({path.stem: page} if path.name != "__init__.py" else page)
    return nav


def _page_of_module(name: str) -> str:
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"# {module}\n\n::: {module}\n"


def _page_of_recipe(path: Path) -> str:
    """A recipe is its source: keys, values and the comments that explain them."""
    source = path.read_text(encoding="utf-8")
    return f"# {path.relative_to(ROOT)}\n\n````python\n{source}````\n" if source else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the pages")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier pages")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # what is wrong with a page
    try:
        with outputs.replacing_folder(args.out, overwrite=args.overwrite) as draft:
            build(draft)
    except outputs.Taken as error:
        raise SystemExit(f"docs.py: {error}") from error
    print(f"Guides and API reference: {args.out / 'index.html'}")
    print(f"With search: python -m http.server --directory {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
