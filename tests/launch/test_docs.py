"""The site: the guides, a page for every module and recipe, everything public, nothing lost."""

import ast
import html
import json
import re
import subprocess
from pathlib import Path

import pytest

from blip2_jax import cli
from tests.readme.text import GUIDES

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent.parent
SOURCES = [
    path
    for folder in ("blip2_jax", "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name == "__init__.py" or not path.name.startswith("_")
]


def documented(path: Path) -> list[tuple[str, str | None]]:
    """The module and all that is public in it, by name, with their docstrings."""

    def inside(node: ast.Module | ast.ClassDef, name: str):
        yield name, ast.get_docstring(node)
        for part in node.body:
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                own = f"{name}.{part.name}"
                if part.name.startswith("_") and part.name != "__call__":
                    continue
                if isinstance(part, ast.ClassDef):
                    yield from inside(part, own)
                else:
                    yield own, ast.get_docstring(part)

    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return list(inside(ast.parse(path.read_text()), name))


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def letters(text: str) -> str:
    return re.sub(r"\W", "", text)


def page_of(path: Path) -> str:
    """Of a source file, in the site."""
    page = path.relative_to(ROOT).with_suffix("")
    return f"reference/{page.parent / 'index' if page.name == '__init__' else page}.html"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built once; a link that leads nowhere and a docstring that cannot be read are errors."""
    out = tmp_path_factory.mktemp("docs")
    cli.load_module("launch/docs.py").build(out)
    return out


def test_every_page_is_there_and_can_be_searched(site):
    pages = {page_of(path) for path in SOURCES if path.stat().st_size}
    pages |= {"index.html", "contributing.html", "changelog.html"}
    pages |= {path.with_suffix(".html").name for path in GUIDES.paths[1:]}
    assert all((site / page).is_file() for page in pages)
    index = json.loads((site / "search/search_index.json").read_text())
    assert pages <= {entry["location"].partition("#")[0] for entry in index["docs"]}


def test_the_front_page_is_the_readme_and_leads_to_all_parts(site):
    front = (site / "index.html").read_text()
    pages = ["install.html", "contributing.html", "reference/blip2_jax/index.html"]
    for page in (*pages, "pictures/report.png", "reference/configs/default.html"):
        assert re.search(rf'(href|src)="{page}"', front), page
        assert (site / page).is_file()


def test_nothing_is_fetched_from_the_web(site):
    for page in site.rglob("*.html"):
        found = re.findall(
            r'<(?:link|script|img)[^>]*(?:href|src)="(https?:[^"]*)"', page.read_text()
        )
        assert not found, page


def test_a_page_has_all_that_is_public_under_the_names_that_people_import(site):
    front = (site / "reference/blip2_jax/index.html").read_text()
    for name in ("load", "Blip2", "Blip2.caption", "Blip2.match"):
        assert f'id="blip2_jax.{name}"' in front
    page = (site / "reference/blip2_jax/models/qformer.html").read_text()
    for name in ("QFormer", "QFormer.__call__", "QFormer.attention_maps", "key_mask"):
        assert f'id="blip2_jax.models.qformer.{name}"' in page
    keys = text_of((site / "reference/configs/default.html").read_text())
    assert "# of initialization, data order, dropout and negatives" in keys


SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_all_that_is_public_has_a_docstring_of_which_nothing_is_lost(site, path):
    recipe = path.is_relative_to(ROOT / "configs")
    if recipe and not path.stat().st_size:
        return
    page = (site / page_of(path)).read_text()
    if recipe:  # is its source
        assert letters(path.read_text()) in letters(text_of(page))
        return
    text = letters(text_of(page))
    # Columns and pictures keep their spaces in code alone.
    code = text_of("".join(re.findall(r"<pre>.*?</pre>", page, flags=re.S)))
    for name, docstring in documented(path):
        assert docstring, f"{name} has no docstring"
        for line in filter(None, docstring.splitlines()):
            if line.strip() in SECTIONS or line.strip().startswith("```"):
                continue
            # "name: what it is" has the type between the two, "module.Error: when" no module.
            parts = [line]
            if letters(line) not in text:
                first, *rest = line.split(": ", 1)
                parts = [first.rpartition(".")[2], *rest]
            assert all(letters(part) in text for part in parts), f"{name}: {line}"
            if re.search(r"\S {3,}\S|( [x.]){3}$", line):
                assert line.strip() in code, f"{name}: {line}"


def test_pages_take_no_place_of_other_files(tmp_path, monkeypatch):
    docs = cli.load_module("launch/docs.py")
    monkeypatch.setattr(docs, "build", lambda out: (out / "index.html").write_text("pages"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("mine")
    for words in ([], ["--overwrite"]):
        monkeypatch.setattr("sys.argv", ["docs.py", f"--out={tmp_path / 'site'}", *words])
        with pytest.raises(SystemExit, match="did not write"):
            docs.main()
    assert (tmp_path / "site/index.html").read_text() == "mine"
    for words in ([], ["--overwrite"]):
        monkeypatch.setattr("sys.argv", ["docs.py", f"--out={tmp_path / 'docs'}", *words])
        assert docs.main() == 0


def test_the_command_explains_itself():
    def run(word):
        return subprocess.run([ROOT / "launch/docs.sh", word], capture_output=True, text=True)

    assert "--out=DIR" in run("--help").stdout
    assert "--overwrite" in run("--help").stdout
    wrong = run("--output=x")
    assert wrong.returncode == 2 and "try --help" in wrong.stderr
