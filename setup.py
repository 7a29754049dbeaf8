"""The list of packages: everything under the three folders of `flowanchor` (package-dir in pyproject.toml)."""

from setuptools import find_packages, setup

FOLDERS = {"flowanchor": "src/flowanchor", "flowanchor.plugins": "plugins", "flowanchor.conf": "conf"}

setup(
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in [package, *(f"{package}.{sub}" for sub in find_packages(folder))]
    ]
)
