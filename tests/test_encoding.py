"""Texts are UTF-8 in files, whatever the encoding of the machine is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support import fresh_process

import ncsr_fast
from ncsr_fast import benchmarks, kernels

FOLDERS = [Path(folder) for module in (ncsr_fast, benchmarks, kernels) for folder in module.__path__]
FILES = sorted({path for folder in FOLDERS for path in folder.rglob("*.py")})


def texts_without_an_encoding(source: str) -> list[int]:
    """The lines of calls that read or write a text in the encoding of the machine."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        keywords = {keyword.arg for keyword in call.keywords}
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text"):
            of_metadata = call.func.attr == "read_text" and len(call.args) == 1  # a distribution's, of importlib.metadata
            if "encoding" not in keywords and not of_metadata:
                lines.append(call.lineno)
        elif isinstance(call.func, ast.Name) and call.func.id == "open":
            mode = call.args[1].value if len(call.args) > 1 else "r"
            if "b" not in mode and "encoding" not in keywords:
                lines.append(call.lineno)
    return lines


def test_every_text_says_its_encoding():
    assert len(FILES) > 100
    assert {str(path): found for path in FILES if (found := texts_without_an_encoding(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "line, found",
    [
        ("path.write_text(text)", 1), ("path.read_text(errors='replace')", 1), ("open(path)", 1), ("open(path, 'a')", 1),
        ("path.write_text(text, encoding='utf-8')", 0), ("open(path, 'rb')", 0), ("distribution.read_text('RECORD')", 0),
    ],
)  # fmt: skip
def test_texts_without_an_encoding_are_found(line, found):
    assert len(texts_without_an_encoding(line)) == found


WRITTEN = """
import json, locale, sys
from pathlib import Path
assert locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8")
from support import tiny_model
from ncsr_fast.cli.main import main
model = tiny_model()
model.save_pretrained("m")
assert main(["convert", "m", "--out", "x.pth", "--report", "report.txt"]) == 0
text = Path("report.txt").read_bytes().decode("utf-8")
assert " \\u2192 " in text
Path("4x.yml").write_bytes("name: \\u8fd0\\u884c\\nnetwork_G: 3\\n".encode())
assert main(["convert", "x.pth", "--out", "y", "--options", "4x.yml"]) == 1
from ncsr_fast.training.run import Run
from support import tiny_settings
Run(Path("run"), tiny_settings("photos")).begin(["not followed: \\u8fd0"])
assert Path("run/published_options.txt").read_bytes().decode("utf-8") == "not followed: \\u8fd0\\n"
"""


@pytest.mark.slow
def test_texts_on_a_machine_of_another_encoding(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parent)}
    fresh_process(WRITTEN, tmp_path, **ascii_only)
