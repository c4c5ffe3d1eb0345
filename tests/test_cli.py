import re
import sys
import textwrap

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from blip2_jax import cli

DEFAULT = """
    from ml_collections import ConfigDict, config_dict

    def get_config():
        config = ConfigDict()
        config.total_steps = 100
        config.optim = ConfigDict({"peak_lr": 1e-4, "betas": (0.9, 0.98), "nesterov": False})
        config.optim.steps = config.get_ref("total_steps")
        config.name = "default"
        config.init = None
        config.layers = [1, 2]
        return config
"""
RECIPE = """
    from configs.default import get_config as default

    def get_config(variant="small"):
        config = default()
        config.name = variant
        return config
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A repository with two config files, seen from somewhere else."""
    folder = tmp_path / "repo" / "configs"
    (folder / "quickstart").mkdir(parents=True)
    (folder / "default.py").write_text(textwrap.dedent(DEFAULT))
    (folder / "quickstart" / "stage1.py").write_text(textwrap.dedent(RECIPE))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return str(folder / "quickstart" / "stage1.py")


def refused(capsys, *argv):
    """The message of a refused command line."""
    with pytest.raises(SystemExit) as exit_info:
        cli.parse("Trains.", argv)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_a_recipe_finds_its_default_from_any_folder(recipe):
    args = cli.parse("Trains.", [f"--config={recipe}"])
    assert args.config.total_steps == 100
    assert args.config.name == "small"
    assert args.config_path == recipe


def test_loading_leaves_no_trace(recipe):
    path, modules = list(sys.path), {name for name in sys.modules if name.startswith("configs")}
    cli.load_config(recipe)
    assert sys.path == path
    assert {name for name in sys.modules if name.startswith("configs")} == modules


def test_a_recipe_takes_an_argument(recipe):
    assert cli.load_config(f"{recipe}:large").name == "large"


def test_overrides_take_the_type_of_their_key(recipe):
    words = "total_steps=7 optim.peak_lr=1 optim.nesterov=true optim.betas=(0.8,0.9) name=3"
    config = cli.load_config(recipe, [f"--config.{word}" for word in words.split()])
    assert config.total_steps == 7
    assert config.optim.steps == 7, "a reference follows what it refers to"
    assert config.optim.peak_lr == 1.0 and isinstance(config.optim.peak_lr, float)
    assert config.optim.nesterov is True
    assert config.optim.betas == (0.8, 0.9)
    assert config.name == "3"


def test_a_key_without_a_value_takes_any(recipe):
    assert cli.load_config(recipe, ["--config.init=path/to.pth"]).init == "path/to.pth"
    assert cli.load_config(recipe, ["--config.init=(1, 2)"]).init == (1, 2)


def test_a_list_can_be_set(recipe):
    assert cli.load_config(recipe, ["--config.layers=(3,4,5)"]).layers == (3, 4, 5)


def test_a_group_of_a_recipes_own_names_can_be_emptied():
    """The mixture of a published recipe, for data of one's own; no group of fixed keys."""
    config = cli.load_config("configs/stage1.py", ["--config.data.mixture={}"])
    assert config.data.mixture == FrozenConfigDict()
    with pytest.raises(cli.ConfigError, match="optim is a group"):
        cli.load_config("configs/stage1.py", ["--config.optim={}"])


def test_the_config_cannot_be_changed(recipe):
    config = cli.load_config(recipe)
    with pytest.raises(AttributeError):
        config.total_steps = 1
    assert isinstance(hash(config), int)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optim.peak_lrs", "--config.optim.peak_lr"),
        ("peak_lr", "--config.optim.peak_lr"),
        ("totalsteps", "--config.total_steps"),
        ("optim.total_steps", "--config.total_steps"),
        ("zzz", "At the top there are: init, layers, name, optim, total_steps."),
    ],
)
def test_an_unknown_key_is_refused_with_those_near_it(recipe, capsys, key, near):
    message = refused(capsys, f"--config={recipe}", f"--config.{key}=1")
    assert f"There is no key --config.{key}." in message
    assert near in message


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("total_steps=many", "takes int; it is 100"),
        ("total_steps=1.5", "takes int; it is 100"),
        ("optim.peak_lr=high", "takes float; it is 0.0001"),
        ("optim.nesterov=perhaps", "takes bool; it is False"),
        ("optim=3", "is a group; set one of its keys: betas, nesterov, peak_lr, steps."),
        ("total_steps", "write --config.total_steps=VALUE"),
    ],
)
def test_a_wrong_value_is_refused_with_the_type(recipe, capsys, word, expected):
    assert expected in refused(capsys, f"--config={recipe}", f"--config.{word}")


def test_a_missing_file_is_refused_with_those_near_it(recipe, capsys):
    missing = recipe.replace("stage1", "stage_1")
    message = refused(capsys, f"--config={missing}")
    assert f"There is no config file {missing}. Did you mean" in message
    assert recipe in message


def test_a_file_that_is_no_recipe_is_refused(tmp_path, capsys):
    path = tmp_path / "empty.py"
    path.write_text("def get_config():\n    return {}\n")
    assert "returned a dict; it must be a ConfigDict" in refused(capsys, f"--config={path}")
    path.write_text("")
    assert "does not define get_config()" in refused(capsys, f"--config={path}")


def test_a_file_that_is_no_python_is_refused(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(cli.ConfigError, match=r"recipe.json is no Python file.*\.py"):
        cli.load_config(str(tmp_path / "recipe.json"))


def test_a_list_of_dicts_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "listed.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'sources': [{'name': 'a'}]})\n"
    )
    with pytest.raises(cli.ConfigError, match="named entries where there is a list of dicts"):
        cli.load_config(str(path))


def test_flags_and_config_live_together(recipe):
    def add_arguments(parser):
        parser.add_argument("--workdir", required=True)
        parser.add_argument("sources", nargs="*")

    argv = ["a", "--config.name=x", "--workdir=w", "--config", recipe, "b"]
    args = cli.parse("Trains.", argv, add_arguments)
    assert (args.workdir, args.config.name) == ("w", "x")
    args = cli.parse("Converts.", ["a", "b", "--workdir=w"], add_arguments, config=False)
    assert args.sources == ["a", "b"]
    assert not hasattr(args, "config")


def test_the_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit):
        cli.parse("Trains.\n\n    blip2 train  --config=F  100 %\n", ["--help"], prog="blip2 train")
    out = capsys.readouterr().out
    assert out.startswith("usage: blip2 train")
    assert "Trains.\n\n    blip2 train  --config=F  100 %" in out
    assert "--config.KEY=VALUE" in out


def test_help_fits_the_terminal_and_keeps_what_is_indented(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "50")
    command = "    blip2 train --config=configs/digits/stage1.py --workdir=DIR"
    with pytest.raises(SystemExit):
        cli.parse(f"Trains. {12 * 'word '}\n\n{command}\n\nEnd.", ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert command in lines and all(len(line) <= 50 for line in lines if line != command)


def test_a_workdir_of_another_run_is_refused(tmp_path):
    saved = {"recipe": "stage1", "config": {"seed": 1, "steps": 5}, "seconds": 3}
    cli.check_same_run(saved, {"recipe": "stage1"}, tmp_path)
    with pytest.raises(cli.ConfigError, match="config.seed: 1 saved, 2 now"):
        cli.check_same_run(saved, {"config": {"seed": 2, "steps": 5}}, tmp_path)


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(cli.ConfigError, match="--workdir=.*file/run cannot be made .Not a direct"):
        cli.make_workdir(tmp_path / "file/run")


def test_a_recipes_sweep_is_within_reach(recipe):
    with open(recipe, "a") as file:
        file.write("\ndef sweep(add):\n    add(name='a')\n")
    points = []
    cli.load_module(recipe).sweep(lambda **point: points.append(point))
    assert points == [{"name": "a"}]


def test_json_keeps_a_config_and_is_stable(recipe):
    config = cli.load_config(recipe)
    text = cli.config_to_json(config)
    assert cli.config_from_json(text) == config
    assert cli.config_to_json(cli.config_from_json(text)) == text
    shuffled = ConfigDict(dict(reversed(config.to_dict().items())))
    assert cli.config_to_json(shuffled) == text
    assert isinstance(cli.config_from_json(text), FrozenConfigDict)
    assert re.search(r'"betas": \[\s+0.9,\s+0.98\s+\]', text)
