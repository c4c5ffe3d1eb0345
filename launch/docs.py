"""Builds the API reference from the docstrings, as static HTML; `docs.sh` calls it.

python launch/docs.py --out=DIR [--overwrite]
"""

import argparse
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

from blip2_jax.runtime import outputs

ROOT = Path(__file__).resolve().parent.parent

# Where libraries define what they export elsewhere -> the name that people import.
NAMES = {
    "flax.nnx.graphlib.GraphDef": "nnx.GraphDef",
    "flax.nnx.module.Module": "nnx.Module",
    "flax.nnx.nn.linear.": "nnx.",
    "flax.nnx.nn.normalization.": "nnx.",
    "flax.nnx.rnglib.Rngs": "nnx.Rngs",
    "flax.nnx.variablelib.Param": "nnx.Param",
    "grain._src.python.dataset.dataset.": "grain.",
    "jax._src.mesh.Mesh": "jax.sharding.Mesh",
    "jax._src.stages.": "jax.stages.",
    "jax.jaxlib._jax.Array": "jax.Array",
    "ml_collections.config_dict.config_dict.": "ml_collections.",
    "numpy.random._generator.Generator": "numpy.random.Generator",
    "optax._src.base.": "optax.",
}


def build(out: Path) -> None:
    """Writes a page for each public module of the package, and for each config.

    Args:
      out: the folder, made if need be; `index.html` in it leads to the package's own page.

    Raises:
      UserWarning: what cannot be rendered as it stands, e.g. a type that does not exist.
    """
    sys.path.insert(0, str(ROOT))
    import blip2_jax

    for name in blip2_jax.__all__:
        getattr(blip2_jax, name)  # imported when first used; pdoc shows what is there
    parts = [part.name for part in pkgutil.iter_modules(blip2_jax.__path__)]
    modules = ["blip2_jax", *(f"blip2_jax.{p}" for p in parts if not p.startswith("_")), "configs"]
    pdoc.render.configure(
        docformat="google",
        footer_text=f"blip2_jax {blip2_jax.__version__}",
        template_directory=Path(__file__).parent / "docs",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"pdoc\.")
        pdoc.pdoc(*modules, output_directory=out)
    for page in out.rglob("*.html"):
        page.write_text(_with_public_names(page.read_text(encoding="utf-8")), encoding="utf-8")


def _with_public_names(page: str) -> str:
    """A page with the names of `NAMES` changed, in plain text and in signatures word by word."""
    for defined, public in NAMES.items():
        page = page.replace(defined, public).replace(_words(defined), _words(public))
    return page


def _words(name: str) -> str:
    """A dotted name as it is highlighted in a signature."""
    dot = '<span class="o">.</span>'
    return dot.join(f'<span class="n">{word}</span>' if word else "" for word in name.split("."))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the pages")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier pages")
    args = parser.parse_args()
    try:
        with outputs.replacing_folder(args.out, overwrite=args.overwrite) as draft:
            build(draft)
    except outputs.Taken as error:
        raise SystemExit(f"docs.py: {error}") from error
    print(f"API reference: {args.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
