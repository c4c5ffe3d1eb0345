"""Texts of the command line, parsed as values of the type that the default has."""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

_ESCAPE = re.compile(r"\\(n|t|r|\\|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")
_BOOLS = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}


def unescape(text: str) -> str:
    r"""Text with the escapes that a shell leaves as they are: \n \t \r \\ \xHH \uHHHH."""
    letters = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return _ESCAPE.sub(lambda m: letters.get(m[1]) or chr(int(m[1][1:], 16)), text)


def escape(text: str) -> str:
    """The inverse of `unescape`, on one line."""
    for plain, escaped in (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r")):
        text = text.replace(plain, escaped)
    return text


def parse(text: str, default: Any, *, several: bool = False) -> Any:
    """The text as a value of its default's type.

    Args:
      text: as typed.
      default: a bool, int, float, text, tuple or list; None takes any Python literal, or else text.
      several: a text that may be several texts, or None, too.

    Raises:
      ValueError: it does not fit; the message is what would.
    """
    if default is None:
        return _literal(text)
    if isinstance(default, (tuple, list)):
        return _parse_tuple(text, default)
    if several and text == "None":
        return None
    if several and ("," in text or text[:1] in tuple("([")):
        return _parse_tuple(text, [""])
    return _parse_one(text, type(default))


def _parse_one(text: str, kind: type[Any]) -> Any:
    if kind is str:  # a text cannot be None: an empty one is meant
        return "" if text == "None" else unescape(text)
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError("true or false")
        return _BOOLS[text.lower()]
    if kind in (int, float):
        try:
            number = int(text, 0)
        except ValueError:
            number = _float(text, "a whole number" if kind is int else "a number")
        if kind is int and number != int(number):
            raise ValueError("a whole number")
        return kind(number)
    raise ValueError(f"a {kind.__name__}")


def _float(text: str, wanted: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(wanted) from None
    if not math.isfinite(number):
        raise ValueError(f"{wanted}, which is finite")
    return number


def _parse_tuple(text: str, default: Sequence[Any]) -> tuple[Any, ...]:
    """Elements between commas, with or without brackets, each of the type of the default's."""
    kinds = {type(value) for value in default} or {str}
    kind = kinds.pop() if len(kinds) == 1 else float if kinds == {int, float} else object
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("()", "[]"):
        inner = inner[1:-1].strip()
    if any(mark in inner for mark in "'\"(["):  # Python's notation
        elements = _literal(f"({inner.rstrip(',')},)")
        if not isinstance(elements, tuple):
            raise ValueError("values between commas")
    else:
        elements = [unescape(part.strip()) for part in inner.rstrip(",").split(",") if inner]
    if "" in elements and kind is not str:
        raise ValueError("values between commas, none of them empty")
    if kind in (int, float) and isinstance(default, tuple) and len(elements) != len(default):
        raise ValueError(f"{len(default)} numbers between commas, as {default!r}")
    if kind in (int, float, bool):
        return tuple(_parse_one(str(value), kind) for value in elements)
    return tuple(str(value) if kind is str else value for value in elements)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return unescape(text)


def did_you_mean(name: str, known: Sequence[str], synonyms: Mapping[str, str] | None = None) -> str:
    """ " Did you mean X?" for a name that is not known, or "" where none is near.

    Args:
      name: as typed.
      known: the names there are.
      synonyms: what others call some of them.
    """
    meant = (synonyms or {}).get(name)
    near = [meant] if meant else get_close_matches(name, known, 3, 0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""
