"""Build of ncsr_fast: where its packages are. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["ncsr_fast", "ncsr_fast.*"]), package_data={"ncsr_fast": ["models/*/*"]})
