"""The house's words and sizes: names are the field's, files and functions are short.

A name is looked at where it is defined: classes, functions, parameters, variables, attributes.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "blip2_jax"

# Not these, but the field's: see the glossary in CONTRIBUTING.
WORDS = {
    "Memory": "KVCache",
    "lineage": "ancestor_mask",
    "branches": "beams or num_sequences",
    "NEVER": "NEG_INF",
    "said": "generated or seen_tokens",
    "said_ids": "prefix_ids",
    "length_counts": "length_penalty_includes_prompt",
    "ahead": "prefetch",
    "aside": "pause",
    "look": "flush",
    "useful": "productive_seconds",
    "Lines": "Predictions",
    "Heldout": "EvalDataset",
}
PREFIXES = {"most_": "max_"}
# Of variables and parameters: they do not say what it is.
VAGUE = ("words", "rows", "found", "place", "places", "how", "that")
# Right elsewhere, but not in these folders.
LOCAL = {
    ("models", "inference"): {"written": "generated", "segments": "cached keys and values"},
}
# Right for variables, but not for functions and methods of these folders.
FUNCTIONS = {
    ("models", "inference"): {
        "start": "prefill",
        "extend": "decode_step",
        "use": "set_params",
        "can": "supports",
        "_see": "_visual_prompt",
        "_over": "_map_batches",
        "_write": "_generate_texts",
        "_asked": "_format_questions",
    },
}
# What a name is right for, in one file.
RIGHT = {
    "weights/rows.py": {"rows"},  # of a table
    "weights/tables.py": {"rows"},
}

MAX_FILE, MAX_FUNCTION = 450, 80
REASON = "# long:"  # on a def's line or above it, or on a line of its own at the head of a file

FILES = {str(file.relative_to(ROOT)): file for file in sorted(ROOT.rglob("*.py"))}


def definitions(tree: ast.AST) -> Iterator[tuple[str, int, str]]:
    """Names that a module defines, with the line and the kind."""
    attributes = {
        id(statement.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, node.lineno, "class"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, "function"
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno, "variable"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno, "attribute" if id(node) in attributes else "variable"
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno, "attribute"
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno, "variable"


def better(name: str, file: str, kind: str) -> str | None:
    """What a name should be; None where it is right."""
    if name in RIGHT.get(file, ()):
        return None
    if name in WORDS:
        return WORDS[name]
    for prefix, instead in PREFIXES.items():
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    if kind == "variable" and name in VAGUE:
        return "what it is"
    tables = [LOCAL, FUNCTIONS] if kind == "function" else [LOCAL]
    for folders, words in (entry for table in tables for entry in table.items()):
        if file.split("/")[0] in folders and name in words:
            return words[name]
    return None


@pytest.mark.parametrize("file", FILES)
def test_names_are_the_fields(file):
    wrong = [
        f"{file}:{line}: {name}, but: {instead}"
        for name, line, kind in definitions(ast.parse(FILES[file].read_text()))
        if (instead := better(name, file, kind))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_short(file):
    lines = FILES[file].read_text().splitlines()
    tree = ast.parse("\n".join(lines))
    if len(lines) > MAX_FILE:
        assert any(line.startswith(REASON) for line in lines), f"{file} has {len(lines)} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            length = (node.end_lineno or first) - first + 1
            said_why = any(REASON in line for line in lines[first - 2 : node.body[0].lineno])
            assert length <= MAX_FUNCTION or said_why, (
                f"{file}:{first}: {node.name}, {length} lines"
            )


def test_functions_are_defined_with_def():
    """A lambda with a name is ruff's E731, and nothing silences it."""
    silenced = "noqa: E" + "731"
    for folder in ("blip2_jax", "configs", "launch", "tests"):
        for file in (ROOT.parent / folder).rglob("*.py"):
            assert silenced not in file.read_text(), file


def test_the_words_are_found():
    source = "def f(how, most_x):\n  rows = [0 for found in how]\nclass Memory:\n  rows: int\n"
    names = list(definitions(ast.parse(source)))
    wrong = {name for name, _, kind in names if better(name, "a.py", kind)}
    assert wrong == {"how", "most_x", "rows", "found", "Memory"}
    assert ("rows", 4, "attribute") in names and not better("rows", "a.py", "attribute")
    assert all(word != instead for word, instead in WORDS.items())
    assert better("start", "models/t5.py", "function")
    assert not better("start", "models/t5.py", "variable")
