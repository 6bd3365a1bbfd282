"""Build of ncsr_fast. Everything but the packages' places is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'__version__ = "(.+)"', Path(__file__).parent.joinpath("ncsr_fast/__init__.py").read_text())[1]

setup(
    version=version,
    packages=find_packages(include=["ncsr_fast", "ncsr_fast.*"]),
    package_data={"ncsr_fast": ["models/*/*"]},
)
