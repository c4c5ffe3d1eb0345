import re
import sys
import textwrap
from pathlib import Path

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from blip2_jax import cli
from blip2_jax.__main__ import main
from blip2_jax.runtime import values
from blip2_jax.sweeps import points

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


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("stage1", "configs/stage1.py"),
        ("stage1:vitl-paper", "configs/stage1.py:vitl-paper"),
        ("digits/stage1", "configs/digits/stage1.py"),
        ("eval/vqa:vitg-flant5xl", "configs/eval/vqa.py:vitg-flant5xl"),
    ],
)
def test_a_packaged_recipe_has_a_name(name, file, tmp_path, monkeypatch):
    """From any folder, also where something else has this name."""
    (tmp_path / "stage1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.load_config(name) == cli.load_config(file)
    with pytest.raises(
        cli.ConfigError, match=r"(?s)no config file digits/stage3.*digits/stage1\.py"
    ):
        cli.load_config("digits/stage3")


def test_a_file_goes_before_a_packaged_recipe(recipe, monkeypatch):
    folder = Path(recipe).parents[1]
    assert cli.load_config("configs/default.py") != cli.load_config(str(folder / "default.py"))
    monkeypatch.chdir(folder.parent)
    assert cli.load_config("configs/default.py") == cli.load_config(str(folder / "default.py"))


def test_loading_leaves_no_trace(recipe):
    path, modules = list(sys.path), {name for name in sys.modules if name.startswith("configs")}
    cli.load_config(recipe)
    assert sys.path == path
    assert {name for name in sys.modules if name.startswith("configs")} == modules


@pytest.mark.parametrize(
    "statement",
    [
        "import sizes",
        "from . import sizes",
        "from .sizes import N; import sizes",
        "import sub.sizes as sizes",
    ],
)
def test_a_recipe_imports_the_files_beside_it(tmp_path, statement):
    """Each its own: no trace is left that could answer another recipe's import."""
    before = set(sys.modules)
    for number in (1, 2):
        folder = tmp_path / str(number)
        (folder / "sub").mkdir(parents=True)
        (folder / "sub/__init__.py").write_text("")
        for name in ("sizes.py", "sub/sizes.py"):
            (folder / name).write_text(f"N = {number}\n")
        (folder / "mine.py").write_text(
            f"from configs.default import get_config as default\n{statement}\n"
            "def get_config():\n    import sizes as late\n    config = default()\n"
            "    config.steps = sizes.N + late.N\n    return config\n"
        )
        assert cli.load_config(str(folder / "mine.py")).steps == 2 * number
        assert not {"sizes", "sub", "mine", "_recipes"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    "body, said",
    [
        ("import nothing_of_this_name", "mine.py:2: ModuleNotFoundError: No module named 'nothing"),
        ("def get_config(:", "SyntaxError"),
        ("def get_config():\n    return undefined", "mine.py:3: NameError: name 'undefined'"),
        (
            "from configs.default import get_config as default\n"
            "def get_config():\n    config = default()\n    config.optim.peak_lrs = 1\n",
            "mine.py:5: AttributeError: .*peak_lrs.*Did you mean .peak_lr",
        ),
    ],
)
def test_a_recipe_that_fails_is_one_message(tmp_path, body, said):
    (tmp_path / "mine.py").write_text(f"\n{body}\n")
    with pytest.raises(cli.ConfigError, match=said):
        cli.load_config(str(tmp_path / "mine.py"))


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


@pytest.mark.parametrize(
    ("word", "want"),
    [
        ("trainable=qformer,temp", ("qformer", "temp")),
        ("trainable=qformer", ("qformer",)),
        ("trainable=(qformer, temp)", ("qformer", "temp")),
        ("trainable=['qformer','temp']", ("qformer", "temp")),
        ("trainable=", ()),
        ("optim.betas=0.8,0.9", (0.8, 0.9)),
        ("optim.betas=[0.8, 1]", (0.8, 1.0)),
        ("data.randaugment=2,5", (2, 5)),
        ("sharding.embed=None", None),
        ("sharding.embed=data,fsdp", ("data", "fsdp")),
        ("sharding.embed=('data', 'fsdp')", ("data", "fsdp")),
        ("sharding.embed=tensor", "tensor"),
        ("steps=1e3", 1000),
        ("steps=2_000", 2000),
        ("steps=20.0", 20),
        ("optim.peak_lr=1", 1.0),
        ("optim.decay_biases=yes", True),
        ("optim.decay_biases=0", False),
        ("init.checkpoint=None", ""),
        ("data.prompt=None of these, or those", "None of these, or those"),
        ("data.dir=a,b", "a,b"),
        ("name=3", "3"),
        (r"data.end_of_text=\n", "\n"),
        (r"data.end_of_text=\\n", r"\n"),
        (r"data.prompt=Q:\t{}\x41\u00e9 \d", "Q:\t{}A\u00e9 " + r"\d"),
    ],
)
def test_values_are_read_as_the_type_of_their_key(word, want):
    config = cli.load_config("configs/stage2.py:vitg-opt2.7b-paper", [f"--config.{word}"])
    value = config
    for part in word.partition("=")[0].split("."):
        value = value[part]
    assert value == want and type(value) is type(want)
    assert cli.config_from_json(cli.config_to_json(config)) == config


def test_values_of_keys_without_a_type():
    path = "configs/eval/ranking.py"
    task = next(iter(cli.load_config(path).tasks))
    words = ["candidates=yes,no,2", "prompt=Is {}?"]
    config = cli.load_config(path, [f"--config.tasks.{task}.{word}" for word in words])
    assert config.tasks[task].candidates == ("yes", "no", "2")
    assert config.tasks[task].prompt == "Is {}?"


def test_what_a_sweep_writes_is_read_back():
    for value in ("a\nb", r"a\nb", "\\", ("a", "b\n"), (0.5, 1.0), 3, 1e-4, True, None, "plain"):
        text = points.as_text(value)
        assert values.parse(text, value) == value and "\n" not in text


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
        ("total_steps=many", "takes a whole number; it is 100"),
        ("total_steps=1.5", "takes a whole number; it is 100"),
        ("total_steps=None", "takes a whole number; it is 100"),
        ("total_steps=1,000", "takes a whole number; it is 100"),
        ("optim.peak_lr=high", "takes a number; it is 0.0001"),
        ("optim.peak_lr=nan", "takes a number, which is finite; it is 0.0001"),
        ("optim.nesterov=perhaps", "takes true or false; it is False"),
        ("optim.betas=0.9", "takes 2 numbers between commas, as (0.9, 0.98); it is (0.9, 0.98)"),
        ("optim.betas=0.9,high", "takes a number"),
        ("optim.betas=0.9,,0.98", "none of them empty"),
        ("optim=3", "is a group; set one of its keys: betas, nesterov, peak_lr, steps."),
        ("total_steps", "write --config.total_steps=VALUE"),
    ],
)
def test_a_wrong_value_is_refused_with_the_type(recipe, capsys, word, expected):
    assert expected in refused(capsys, f"--config={recipe}", f"--config.{word}")


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--modle=x", "There is no --modle. Did you mean --model?"),
        ("--max-new-tokens", "There is no --max-new-tokens. Did you mean --max_new_tokens?"),
        ("--max_length=9", "There is no --max_length. Did you mean --max_new_tokens?"),
        ("--zzz", "There is no --zzz.\n"),
    ],
)
def test_an_unknown_flag_is_refused_with_those_near_it(capsys, flag, near):
    def add_arguments(parser):
        parser.add_argument("--model", required=True)
        parser.add_argument("--max_new_tokens")

    with pytest.raises(SystemExit) as exit_info:
        synonyms = {"max_length": "max_new_tokens"}
        cli.parse("Writes.", [flag], add_arguments, config=False, synonyms=synonyms)
    assert exit_info.value.code == 2 and near in capsys.readouterr().err


@pytest.mark.parametrize(("command", "near"), [("generat", "generate"), ("eval", "evaluate")])
def test_an_unknown_command_is_refused_with_the_one_that_was_meant(capsys, command, near):
    assert main([command]) == 2
    assert f"Did you mean {near}?" in capsys.readouterr().err


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
    made = []
    cli.load_module(recipe).sweep(lambda **point: made.append(point))
    assert made == [{"name": "a"}]


def test_json_keeps_a_config_and_is_stable(recipe):
    config = cli.load_config(recipe)
    text = cli.config_to_json(config)
    assert cli.config_from_json(text) == config
    assert cli.config_to_json(cli.config_from_json(text)) == text
    shuffled = ConfigDict(dict(reversed(config.to_dict().items())))
    assert cli.config_to_json(shuffled) == text
    assert isinstance(cli.config_from_json(text), FrozenConfigDict)
    assert re.search(r'"betas": \[\s+0.9,\s+0.98\s+\]', text)
