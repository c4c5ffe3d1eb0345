"""What all commands share: their help, their flags, and the config they run.

Ordinary flags are argparse's. A config is a Python file with `get_config()`, and any of its keys
can be set from the command line, as `--config.optim.peak_lr=1e-4`; the text is read as the type
that the key has (`runtime.values`). All mistakes are found here, before any work starts.
"""

import argparse
import contextlib
import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from blip2_jax.runtime import dtypes, values
from blip2_jax.runtime.compare import run_differences

_RECIPE_PACKAGE = "_recipes"  # holds a recipe and its siblings while it runs
AddArguments = Callable[[argparse.ArgumentParser], None]
OVERRIDE = "--config."
# Keys of one text, of several, or of none (None): see `runtime.mesh.Rules`.
SEVERAL = re.compile(r"sharding\.\w+")


class ConfigError(ValueError):
    """A config file or an override that cannot be used; the message says what to do."""


@contextlib.contextmanager
def mistakes_in_config() -> Iterator[None]:
    """Turns a ValueError of setting up a run into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def make_workdir(workdir: Path) -> None:
    """Makes the folder that `--workdir` names if it is not there; ConfigError if that cannot be."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be made ({error.strerror}); take a folder that you may "
            "write to."
        ) from error


def parse(
    doc: str | None,
    argv: Sequence[str] | None = None,
    add_arguments: AddArguments | None = None,
    *,
    prog: str | None = None,
    config: bool = True,
    synonyms: Mapping[str, str] | None = None,
) -> argparse.Namespace:
    """Parses a command line.

    Args:
      doc: the command's module docstring, which is its help text.
      argv: the arguments after the command's name; those of this process when None.
      add_arguments: adds the command's own flags to the parser.
      prog: what the usage line calls the command, e.g. "blip2 train".
      config: whether the command runs a config, and so takes `--config` and `--config.key=value`.
      synonyms: what others call some of the command's flags, for "did you mean".

    Returns:
      The flags; `config` is a FrozenConfigDict and `config_path` what was given as `--config`.

    Raises:
      SystemExit: after the help, or with a message about what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_wrap_paragraphs((doc or "").strip()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if config:
        parser.add_argument(
            "--config",
            required=True,
            metavar="RECIPE[:ARG]",
            help="the recipe: a file (my/recipe.py), or the name of one that the package has "
            "(stage1, digits/stage1); --config.KEY=VALUE sets one of its keys, "
            "e.g. --config.optim.peak_lr=1e-4",
        )
    if add_arguments is not None:
        add_arguments(parser)
    arguments = list(sys.argv[1:] if argv is None else argv)
    overrides = [argument for argument in arguments if config and argument.startswith(OVERRIDE)]
    for argument in overrides:
        if "=" not in argument:
            parser.error(f"{argument} has no value: write {argument}=VALUE, with an equals sign.")
    rest = [argument for argument in arguments if argument not in overrides]
    _check_flags(parser, rest, synonyms or {})
    args = parser.parse_intermixed_args(rest)
    if config:
        args.config_path = args.config
        try:
            args.config = load_config(args.config_path, overrides)
        except ConfigError as error:
            parser.error(str(error))
    return args


def dtype(text: str) -> Any:
    """The floating-point type of a flag, by any of its names."""
    try:
        return dtypes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _check_flags(
    parser: argparse.ArgumentParser, arguments: Sequence[str], synonyms: Mapping[str, str]
) -> None:
    """Exits with a message if there is an unknown flag."""
    known = list(parser._option_string_actions)
    others = {f"--{theirs}": f"--{ours}" for theirs, ours in synonyms.items()}
    for argument in arguments:
        flag = argument.partition("=")[0]
        if argument == "--":
            return
        if argument.startswith("--") and flag not in known:
            spelled = "--" + flag[2:].replace("-", "_")
            parser.error(f"There is no {flag}.{values.did_you_mean(spelled, known, others)}")


def _wrap_paragraphs(doc: str) -> str:
    """Wraps paragraphs to the terminal; indented lines (commands, tables) stay as they are."""
    # No break at hyphens: options have them.
    wrapper = textwrap.TextWrapper(
        min(shutil.get_terminal_size().columns, 100) - 2,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return "\n\n".join(
        block if re.search(r"^\s", block, re.M) else wrapper.fill(block)
        for block in re.split(r"\n{2,}", doc)
    )


def load_config(path: str, overrides: Sequence[str] = ()) -> FrozenConfigDict:
    """Loads a recipe and applies overrides to it.

    Args:
      path: `FILE.py`, or the name of a packaged recipe, as `digits/stage1`; `:ARG` behind either
        calls `get_config(ARG)`.
      overrides: `--config.key=value` arguments.

    Raises:
      ConfigError: no such file, key or type.
    """
    _, argument = _split_argument(path)
    module = load_module(path)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} does not define get_config().")
    with _running(Path(module.__file__ or path)):
        config = module.get_config(argument) if argument else module.get_config()
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ConfigError(f"get_config() of {path} returned a {kind}; it must be a ConfigDict.")
    config = _override(config, overrides)
    try:
        return _freeze(config)
    except ValueError as error:
        raise ConfigError(
            f"{path} holds something that cannot be frozen: {error} Use a ConfigDict with named "
            "entries where there is a list of dicts."
        ) from error


def load_module(path: str) -> ModuleType:
    """Runs a recipe file, as `sweep` does to get at its `sweep(add)`.

    A recipe can say `from configs.default import get_config` no matter where the command is called
    from, and one in a `configs/` folder of your own can build on the packaged ones. It can import
    files beside it too, as `import common` or `from .common import sizes`.

    Args:
      path: as in `load_config`; what follows a colon is for `get_config` alone.

    Raises:
      ConfigError: no such file, or one that is not Python, or that fails.
    """
    file = _find(_split_argument(path)[0])
    spec = importlib.util.spec_from_file_location(f"{_RECIPE_PACKAGE}.{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file; the name of a recipe ends in .py.")
    module = importlib.util.module_from_spec(spec)
    with _running(file):
        spec.loader.exec_module(module)
    return module


def _split_argument(path: str) -> tuple[str, str]:
    """The file or name of a recipe, and the argument of its `get_config` ("" if none)."""
    file, dot, argument = path.partition(".py:")
    if dot or path.endswith(".py"):
        return file + dot.removesuffix(":"), argument
    name, _, argument = path.partition(":")
    return name, argument


def _recipes() -> Path:
    """The packaged recipes: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _find(path: str) -> Path:
    """The file of a path, or the packaged recipe of a name.

    A path is looked for here, then in the folder of `configs/`.
    """
    recipes = _recipes()
    candidates = [Path(path), recipes.parent / path, recipes / f"{path}.py"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    folders = [Path(path).parent, (recipes / path).parent, recipes]
    paths = [str(f) for folder in folders if folder.is_dir() for f in sorted(folder.glob("*.py"))]
    files = list(dict.fromkeys(paths))
    by_name = {Path(file).name: file for file in reversed(files)}  # the named folder's go first
    near = [by_name[name] for name in difflib.get_close_matches(Path(path).name, by_name, 5, 0.4)]
    hint = "Did you mean one of these?" if near else "These are the recipes there are:"
    listed = "\n".join(f"  {file}" for file in near or files) or "  (none)"
    raise ConfigError(f"There is no config file {path}. {hint}\n{listed}")


@contextlib.contextmanager
def _running(file: Path) -> Iterator[None]:
    """While a recipe runs, its imports are found, and its errors are ConfigErrors."""
    with _importable(file):
        try:
            yield
        except (ConfigError, KeyboardInterrupt):
            raise
        except Exception as error:
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(error.__traceback__)
                if Path(frame.filename) == file
            ]
            where = f"{file}:{lines[-1]}" if lines else str(file)
            raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _importable(file: Path) -> Iterator[None]:
    """While a recipe is loaded, makes `configs` the folder that it is in, then the packaged one.

    The files beside it are found by their names, as those beside a script are.
    """
    folders = [parent for parent in file.parents if parent.name == "configs"]
    packages = {
        "configs": [str(folder) for folder in (*folders[:1], _recipes())],
        _RECIPE_PACKAGE: [str(file.parent)],
    }
    finder = _SiblingFinder(file.parent)

    def is_of_recipes(name: str) -> bool:
        return name.partition(".")[0] in {*packages, *finder.found}

    # Another `configs`, of another checkout or an earlier call, must not answer the import.
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if is_of_recipes(name)}
    for name, paths in packages.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = paths
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if is_of_recipes(name)]:
            del sys.modules[name]
        sys.modules.update(hidden)


class _SiblingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of a folder, and remembers which were asked for."""

    def __init__(self, folder: Path):
        self._folder, self.found = folder, set[str]()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if path is not None or fullname in sys.stdlib_module_names:
            return None
        file = self._folder / f"{fullname}.py"
        if not file.is_file() and not (self._folder / fullname / "__init__.py").is_file():
            return None
        self.found.add(fullname)
        return importlib.machinery.PathFinder.find_spec(fullname, [str(self._folder)], target)


def _override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies `--config.key=value` arguments in their order."""
    known = flat_keys(config)
    for word in overrides:
        key, _, value = word.removeprefix(OVERRIDE).partition("=")
        if key not in known:
            raise ConfigError(_unknown_key(key, known))
        _set(config, key, value)
    return config


def _set(config: ConfigDict, key: str, value: str) -> None:
    *parents, name = key.split(".")
    holder = config
    for parent in parents:
        holder = holder[parent]
    if isinstance(holder[name], ConfigDict):
        inner = sorted(holder[name].keys())
        if value == "{}" and all(isinstance(part, ConfigDict) for part in holder[name].values()):
            holder[name] = ConfigDict()  # of a recipe's own names, as data.mixture: it may be empty
            return
        raise ConfigError(f"{OVERRIDE}{key} is a group; set one of its keys: {', '.join(inner)}.")
    default = holder[name]
    try:
        typed = values.parse(value, default, several=bool(SEVERAL.fullmatch(key)))
    except ValueError as error:
        raise ConfigError(
            f"{OVERRIDE}{key}={value}: {value!r} does not fit. The key takes {error}; it is "
            f"{default!r} in the recipe."
        ) from error
    with holder.ignore_type():  # a tuple for a list, None for a text
        holder[name] = typed


def flat_keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """All keys with their dots, groups included."""
    keys = []
    for name, value in config.items():
        keys.append(prefix + name)
        if isinstance(value, ConfigDict):
            keys += flat_keys(value, f"{prefix}{name}.")
    return keys


def _unknown_key(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, 3, 0.6)
    # The right name in the wrong group looks nothing like the whole path.
    last = key.rsplit(".", 1)[-1]
    by_name = {path.rsplit(".", 1)[-1]: path for path in known}
    near += [by_name[name] for name in difflib.get_close_matches(last, by_name, 3, 0.7)]
    if near:
        names = ", ".join(OVERRIDE + name for name in dict.fromkeys(near))
        return f"There is no key {OVERRIDE}{key}. Did you mean {names}?"
    groups = ", ".join(sorted(name for name in known if "." not in name))
    return f"There is no key {OVERRIDE}{key}. At the top there are: {groups}."


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], workdir: Path) -> None:
    """Refuses a workdir that holds another run (see `compare.run_differences`).

    Args:
      saved: what the workdir says of its run; may say more than `now`.
      now: what is about to run, as JSON would hold it.
      workdir: named in the message.

    Raises:
      ConfigError: with each entry of `now` that is not the same in `saved`.
    """
    lines = run_differences(saved, now)
    if lines:
        raise ConfigError(another_run(workdir, lines))


def another_run(workdir: Path, lines: Sequence[str]) -> str:
    """The message that a workdir holds another run; `lines` say how it differs."""
    return (
        f"{workdir} holds another run. Use a new workdir, or what that run was started with:\n"
        + "\n".join(lines)
    )


def config_to_json(config: Mapping[str, Any] | ConfigDict) -> str:
    """The config as JSON; equal configs give equal text."""
    return json.dumps(_freeze(config).to_dict(), sort_keys=True, indent=2)


def config_from_json(text: str) -> FrozenConfigDict:
    """The inverse of `config_to_json`; sequences come back as tuples, as in any frozen config."""
    return _freeze(json.loads(text))


def _freeze(config: Mapping[str, Any] | ConfigDict) -> FrozenConfigDict:
    # Twice: a frozen config shows its lists as tuples but, when compared, still knows which is
    # which. After the second round there are only tuples, before and after JSON.
    return FrozenConfigDict(FrozenConfigDict(config).to_dict())
