"""Says what is packaged, for pip; everything else about the package is in setup.cfg."""

from setuptools import find_packages, setup

# The recipes lie beside the package, where people read and change them. They are installed in it:
# a package called `configs` would be in others' way.
RECIPES = "blip2_jax.configs"

setup(
    packages=[
        *find_packages(include=["blip2_jax*"]),
        RECIPES,
        *(f"{RECIPES}.{name}" for name in find_packages("configs")),
    ],
    package_dir={RECIPES: "configs"},
)
