"""Templates filled in."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from blip2_jax.runtime import atomic

TEMPLATES = Path(__file__).parent / "templates"


def render(path: str | Path, template: str, **parts: Any) -> Path:
    """Writes the page that a template and its parts make; returns the path."""
    path = Path(path)
    atomic.write_text(path, fill(template, **parts))
    return path


def fill(template: str, **parts: Any) -> str:
    """The page that a template and its parts make.

    Args:
      template: name of a file in `templates/`.
      parts: what it shows; all text is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**parts)
