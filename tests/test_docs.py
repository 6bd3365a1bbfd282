"""The pages: examples run as printed, commands parse, links lead somewhere, and the site builds."""

from __future__ import annotations

import doctest
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ncsr_fast import NCSR, ops
from ncsr_fast.cli.main import build_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_NOT_RUN = "<!-- not run: "  # and the reason, in the line before a block


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page that are in a language and meant to run."""
    found: list[str] = []
    before = ""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith("```") and len(line) > 3:
            code = [inside + "\n" for inside in iter(lines.__next__, "```")]
            if line == f"```{language}" and not before.startswith(_NOT_RUN):
                found.append("".join(code))
        before = line
    return found


# README has its first example in test_readme.py, and its second needs the published program; that of CONTRIBUTING is in
# test_variants.py
@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.parent != ROOT and "```python" in page.read_text(encoding="utf-8")],
    ids=lambda p: p.name,
)
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    """One after the other, as a reader would give them to Python; what they state by assertions holds."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {"__name__": "example"}
    found = blocks(page, "python")
    for number, code in enumerate(found):
        exec(compile(code, f"{page.name}, example {number + 1}", "exec"), names)
    assert "nan" not in capsys.readouterr().out


def test_every_page_with_examples_runs_some():
    """The mark that leaves a block out is no way to leave out a page."""
    for page in (ROOT / "docs").rglob("*.md"):
        if "```python" in page.read_text(encoding="utf-8"):
            assert blocks(page, "python"), page.name


def commands(page: Path) -> list[list[str]]:
    """The arguments of the `ncsr-fast` commands in a page's shell blocks."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("ncsr-fast")]
    return [words[1:] for words in found]


@pytest.mark.parametrize("words", [words for page in PAGES for words in commands(page)], ids=" ".join)
def test_commands_parse(words):
    """Every option that a page names is one."""
    build_parser().parse_args(words)


def test_there_are_commands():
    assert sum(len(commands(page)) for page in PAGES) > 10


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as repositories' viewers and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    """Files and headings that links within the repository name are there."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
        file = (page.parent / target) if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor[1:] in anchors(file), f"{page.name} links to {target}{anchor}"


MODULES = ["ncsr_fast.model", "ncsr_fast.data.perturb", "ncsr_fast.metrics.imresize"] + [
    f"ncsr_fast.ops.{name}"
    for name in (
        "actnorm_invconv",
        "affine",
        "conv3x3",
        "flow_step",
        "fold",
        "gaussian_split",
        "inverse_logdet",
        "step_network",
    )
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name):
    """With what a reader has by then: torch, the operators and, for the model's, a model, an image and a target."""
    names = {"torch": torch, "ops": ops}
    if name == "ncsr_fast.model":
        lr = torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
        names |= {"model": NCSR.from_pretrained("ncsr-compact-x4"), "lr": lr, "target": torch.rand(1, 3, 32, 32)}
    module = importlib.import_module(name)
    examples = [test for test in doctest.DocTestFinder().find(module, extraglobs=names) if test.examples]
    assert examples
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0, example.name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="Sphinx is not installed: the extra docs")
def test_the_site_builds(tmp_path):
    """Without a warning: pages that no contents list, references to nothing, docstrings that cannot be read."""
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api" / "ops.html").read_text(encoding="utf-8")
    assert "affine_coupling" in page and "Parameters" in page
