"""Every name that the README uses there is: commands, options, keys, recipes, files, links."""

import contextlib
import functools
import importlib.util
import io
import re
import shlex

import pytest

from blip2_jax import __main__ as blip2
from blip2_jax import cli
from tests.readme.text import README, ROOT, Page
from tests.test_readme import MADE, extras

# Of `blip2`, in any form.
ALL = dict.fromkeys(text for text in README.forms + README.commands if text[:6] == "blip2 ")


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
    for quote in README.quotes:
        if quote.startswith("--") and not quote.startswith("--config."):
            (option,) = options(quote)
            assert option in THEIRS or option in everything, quote
    for text, comment in README.hints:
        for option in options(comment):
            assert option in help_of(text.split()[1]), f"{text}  # {comment}"


def test_keys_that_the_text_names_there_are():
    """`--config.profile.steps=5`, `optim.vit_layer_decay`, `data.resize="exact"`."""
    keys, found = config_keys(), 0
    groups = {key.partition(".")[0] for key in keys if "." in key}
    for quote in README.quotes:
        key = quote.removeprefix(cli.OVERRIDE).partition("=")[0]
        if key == "KEY":  # any
            continue
        if quote.startswith(cli.OVERRIDE) or (
            key.partition(".")[0] in groups and re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", key)
        ):
            assert key in keys, f"`{quote}`: there is no such key"
            found += 1
    assert found > 10


THE_READERS = {"configs/R.py", "configs/eval/X.py", "configs/eval/mine.py"}


@pytest.mark.parametrize("recipe", [name for name in README.recipes if name not in THE_READERS])
def test_a_recipe_that_the_readme_names_loads(recipe):
    cli.load_config(recipe)


def test_extras_that_the_text_names_there_are():
    for extra in re.findall(r"blip2_jax\[(\w+)\]", README.text):
        assert extra in extras()


OTHERS = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("blip2_jax/assets/*/README.md"))]
OTHER_COMMANDS = [text for path in OTHERS for text in Page(path).commands]


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


def test_every_link_leads_somewhere():
    for target in README.links:
        assert (ROOT / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("name", [name for name in README.files if name not in MADE])
def test_a_file_that_the_readme_names_is_there(name):
    """In the repository or in the package; or it is a model on the hub."""
    if name.startswith("Salesforce/"):
        assert any(name in path.read_text() for path in ROOT.glob("configs/eval/*.py")), name
    else:
        assert (ROOT / name).exists() or (ROOT / "blip2_jax" / name).exists(), name


def test_the_map_of_the_repository_is_right():
    """The plan under "Where things are": names before two spaces, or at the start of a line."""
    (plan,) = (code for code in README.blocks("") if code.startswith("blip2_jax/"))
    folder, found = ROOT, 0
    for line in plan.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = ROOT / names[0]
        for name in names if line.startswith(" ") else names[:1]:
            assert (folder / name if line.startswith(" ") else ROOT / name).exists(), name
            found += 1
    assert found > 15
