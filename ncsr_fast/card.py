"""Cards of models: the README.md of a model directory or of a repository of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ncsr_fast.files import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from ncsr_fast.model import NCSR

CARD = "README.md"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # the Hub's identifiers

_TEMPLATE = """\
---
library_name: ncsr_fast
pipeline_tag: image-to-image
license: {license}
tags:
- normalizing-flow
- {task}
---

# {title}

{description}, {parameters:.1f} M parameters.

```python
from ncsr_fast import NCSR

model = NCSR.from_pretrained({source})
```

## Data

{data}

## Terms

{terms}

## Files

| file | bytes | SHA-256 |
| --- | --- | --- |
{files}

Written by ncsr_fast {version}.
"""


def model_card(model: NCSR, directory: str | os.PathLike, name: str, *, data: str, terms: str, license: str = "other") -> str:
    """The card of a model in Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        model: The model that `model.save_pretrained(directory)` wrote.
        directory: The directory of its files, whose SHA-256 the card states.
        name: What the model is loaded by: "user/name" on the Hub, or the name of a directory.
        data: Which images the model was trained on, where they are from and what they may be used for.
        terms: What the weights may be used for, those of a published program's licence included.
        license: Identifier of the Hub's list of licences, such as "mit" or "cc-by-nc-sa-4.0"; "other": as `terms` says.

    Returns:
        The text.

    Raises:
        ValueError: `data` or `terms` is empty, `license` is no identifier, or `name` is empty or of several lines.
        FileNotFoundError: A file of the model is not in the directory.

    Example:
        >>> model.save_pretrained("mine")
        >>> text = model_card(model, "mine", "user/mine", data="800 photographs of DIV2K.", terms="For research alone.")
    """
    for argument, text in (("data", data), ("terms", terms)):
        if not text.strip():
            raise ValueError(f"{argument} must be a text: a card says what a model was trained on and what it may be used for")
    if not isinstance(license, str) or not _LICENSE.fullmatch(license):
        raise ValueError(
            f"license must be an identifier of the Hub's list, such as 'mit' or 'cc-by-nc-sa-4.0', not {license!r}"
        )
    title = name.rstrip("/").rpartition("/")[2]
    if len(title.splitlines()) != 1:
        raise ValueError(f"name must be a line of text, not {name!r}")
    from ncsr_fast import __version__

    rows = []
    for file in (CONFIG, WEIGHTS):
        content = (Path(directory) / file).read_bytes()
        rows.append(f"| `{file}` | {len(content)} | `{hashlib.sha256(content).hexdigest()}` |")
    return _TEMPLATE.format(
        license=license,
        task="low-light-enhancement" if model.flow.scale == 1 else "super-resolution",
        title=title,
        description=model.describe(),
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        source=json.dumps(name),
        data=data.strip(),
        terms=terms.strip(),
        files="\n".join(rows),
        version=__version__,
    )
