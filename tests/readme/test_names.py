"""Every name in the README and docs/ exists: commands, options, keys, recipes, files, links."""

import contextlib
import functools
import importlib.util
import io
import re
import shlex

import pytest

from blip2_jax import __main__ as blip2
from blip2_jax import cli
from tests.readme.text import DOCS, GUIDES, README, ROOT, Pages, anchors_of
from tests.test_readme import MADE, extras

# Of `blip2`, in any form.
ALL = dict.fromkeys(text for text in GUIDES.forms + GUIDES.commands if text[:6] == "blip2 ")


def options(text: str) -> list[str]:
    """`--name` of every option in a text."""
    return re.findall(r"(?<![\w-])--[a-z_-]+", text)


@functools.cache
def help_of(name: str) -> str:
    """What `blip2 NAME --help` says."""
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        blip2.main([name, "--help"])
    assert ended.value.code == 0
    return said.getvalue()


@functools.cache
def config_keys() -> set[str]:
    """Keys of recipes, with their dots."""
    return set(cli.flat_keys(cli.load_config("configs/default.py")))


def test_every_command_is_explained():
    """In the README; and each --help teaches, with examples."""
    assert blip2.COMMANDS.keys() == {text.split()[1] for text in ALL}
    for name in blip2.COMMANDS:
        assert help_of(name).startswith(f"usage: blip2 {name} ")
        assert help_of(name).count(f"blip2 {name}") > 1, f"blip2 {name} --help has no example"


@pytest.mark.parametrize("text", ALL)
def test_the_help_has_every_option(text):
    name = text.split()[1]
    for option in set(options(text)) - {"--help"}:
        assert re.search(rf"{option}\b", help_of(name)), f"blip2 {name} has no {option}"
    for choice in re.findall(r"\{([\w,]+)\}", text):
        assert f"{{{choice}}}" in help_of(name)


THEIRS = {"--resize_mode": "img2dataset", "--cfg-path": "LAVIS", "--options": "LAVIS"}


def test_options_that_the_text_names_there_are():
    """Alone (`--dry_run`), or in a comment behind a command, of which they are then an option."""
    everything = "".join(help_of(name) for name in blip2.COMMANDS)
    everything += "".join(path.read_text() for path in ROOT.glob("launch/benchmark*.py"))
    for quote in GUIDES.quotes:
        if quote.startswith("--") and not quote.startswith("--config."):
            (option,) = options(quote)
            assert option in THEIRS or option in everything, quote
    for text, comment in GUIDES.hints:
        for option in options(comment):
            assert option in help_of(text.split()[1]), f"{text}  # {comment}"


def test_keys_that_the_text_names_there_are():
    """`--config.profile.steps=5`, `optim.vit_layer_decay`, `data.resize="exact"`."""
    keys, found = config_keys(), 0
    groups = {key.partition(".")[0] for key in keys if "." in key}
    for quote in GUIDES.quotes:
        key = quote.removeprefix(cli.OVERRIDE).partition("=")[0]
        if key == "KEY" or ".KEY" in key:  # any
            continue
        if quote.startswith(cli.OVERRIDE) or (
            key.partition(".")[0] in groups and re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", key)
        ):
            assert key in keys, f"`{quote}`: there is no such key"
            found += 1
    assert found > 10


THE_READERS = {"configs/R.py", "eval/X", "eval/NAME/SCORE"}


@pytest.mark.parametrize("recipe", [name for name in GUIDES.recipes if name not in THE_READERS])
def test_a_recipe_that_the_guides_name_loads(recipe):
    cli.load_config(recipe)


def test_extras_that_the_text_names_there_are():
    named = re.findall(r"'\.\[([\w,]+)\]'", GUIDES.text)
    assert {extra for group in named for extra in group.split(",")} <= extras().keys()
    assert len(named) > 5


OTHERS = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("blip2_jax/assets/*/README.md"))]
OTHER_COMMANDS = [text for text in Pages(tuple(OTHERS)).commands]


@pytest.mark.parametrize("text", OTHER_COMMANDS, ids=OTHER_COMMANDS)
def test_commands_of_other_pages_fit_what_there_is(text):
    """Not run: the package's towers take hours, and the tests are these. What they name exists."""
    program, name, *words = [*shlex.split(text), ""]
    if program == "blip2":
        assert all(option in help_of(name) for option in options(text))
        changes = [word for word in words if word.startswith(cli.OVERRIDE)]
        for recipe in (word.partition("=")[2] for word in words if word.startswith("--config=")):
            cli.load_config(recipe, changes)
    elif program == "python":
        assert name == "-m" and importlib.util.find_spec(words[0])
    elif program == "pip":
        assert shlex.split(text)[-1] in [f".[{extra}]" for extra in extras()]
    else:
        assert (ROOT / program).is_file()
        for word in (name, *words):
            assert "/" not in word or (ROOT / word).exists(), word


LINKED = Pages((*GUIDES.paths, ROOT / "CHANGELOG.md", *OTHERS))


@pytest.mark.parametrize(
    ("page", "target"), LINKED.links, ids=lambda part: getattr(part, "name", part)
)
def test_every_link_leads_somewhere(page, target):
    file, _, anchor = target.partition("#")
    file = (page.parent / file).resolve() if file else page
    assert file.exists(), target
    assert not anchor or anchor in anchors_of(file), f"{file.name} has no heading #{anchor}"


def test_the_readme_is_short_and_lists_every_page():
    assert len(README.text.encode()) <= 12 * 1024
    assert set(DOCS.paths) == set(ROOT.glob("docs/*.md"))


def test_prose_has_lines_that_fit_a_window():
    for path in (*GUIDES.paths, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            in_table = line.startswith(("|", "<img"))
            assert in_table or len(line) <= 120, f"{path.name}:{number} has {len(line)} characters"


def test_the_readme_has_the_results_of_their_page():
    tables = [
        [line for line in (ROOT / name).read_text().splitlines() if line.startswith("| ")]
        for name in ("README.md", "docs/digits.md")
    ]
    ours, theirs = ([line for line in lines if line.count("%") > 2] for lines in tables)
    assert ours and set(ours) <= set(theirs)


@pytest.mark.parametrize(
    "name", [name for name in GUIDES.files if name not in {*MADE, *THE_READERS}]
)
def test_a_file_that_the_guides_name_is_there(name):
    """In the repository or in the package, or a recipe; or it is a model on the hub."""
    if name.startswith("Salesforce/"):
        assert any(name in path.read_text() for path in ROOT.glob("configs/eval/*.py")), name
    else:
        places = [ROOT / name, ROOT / "blip2_jax" / name, ROOT / "configs" / f"{name}.py"]
        assert any(place.exists() for place in places), name


def test_the_map_of_the_repository_is_right():
    """CONTRIBUTING's plan: names before two spaces, or at the start of a line."""
    blocks = Pages((ROOT / "CONTRIBUTING.md",)).blocks("")
    (plan,) = (code for code in blocks if code.startswith("blip2_jax/"))
    folder, found = ROOT, 0
    for line in plan.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = ROOT / names[0]
        for name in names if line.startswith(" ") else names[:1]:
            assert (folder / name if line.startswith(" ") else ROOT / name).exists(), name
            found += 1
    assert found > 15
