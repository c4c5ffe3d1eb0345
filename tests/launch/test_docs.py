"""The API reference: a page for every module, a docstring for everything public, nothing lost."""

import ast
import html
import re
import subprocess
from pathlib import Path

import pytest
from pdoc import docstrings, render_helpers

from blip2_jax import cli

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


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The reference; what cannot be rendered is an error."""
    out = tmp_path_factory.mktemp("docs")
    cli.load_module("launch/docs.py").build(out)
    return out


def test_every_module_and_config_has_a_page(pages):
    for path in SOURCES:
        page = path.relative_to(ROOT).with_suffix(".html")
        page = page.parent.with_suffix(".html") if page.name == "__init__.html" else page
        assert (pages / page).is_file(), page


def test_the_front_page_leads_to_the_public_names_and_to_every_module(pages):
    assert "blip2_jax.html" in (pages / "index.html").read_text()
    front = (pages / "blip2_jax.html").read_text()
    for name in ("load", "Blip2", "Blip2.caption", "Blip2.match"):
        assert f'id="{name}"' in front
    for path in (ROOT / "blip2_jax").iterdir():
        if (path / "__init__.py").is_file() or (path.suffix == ".py" and path in SOURCES[1:]):
            assert f'href="blip2_jax/{path.stem}.html"' in front, path
    assert 'href="configs/default.html"' in front


def test_a_page_has_all_that_is_public_under_the_names_that_people_import(pages):
    page = (pages / "blip2_jax/models/qformer.html").read_text()
    for name in ("QFormer", "QFormer.__call__", "QFormer.attention_maps", "key_mask"):
        assert f'id="{name}"' in page
    assert "jax.Array" in text_of(page) and "_jax.Array" not in text_of(page)
    keys = text_of((pages / "configs/default.html").read_text())
    assert "# of initialization, data order, dropout and negatives" in keys


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_all_that_is_public_has_a_docstring_of_which_nothing_is_lost(path):
    for name, docstring in documented(path):
        if path.is_relative_to(ROOT / "configs") and docstring is None:
            continue  # a config is its source
        assert docstring, f"{name} has no docstring"
        page = str(render_helpers.to_html(docstrings.convert(docstring, "google", None)))
        shown = text_of(page).replace("Arguments:", "Args:")
        assert letters(shown) == letters(re.sub(r"```\w+", "", docstring)), name
        # Columns and pictures keep their spaces in code alone.
        code = text_of("".join(re.findall(r"<pre>.*?</pre>", page, flags=re.DOTALL)))
        for line in docstring.splitlines():
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
