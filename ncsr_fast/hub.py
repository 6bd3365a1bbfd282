"""Models by name: files and folders that are here, the models in the package, and those of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ncsr_fast import files

_REPOSITORY = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)", re.ASCII)  # user/name
_FILES = (".pth", ".pt", ".ckpt", ".state", ".safetensors")  # a name that ends so means a file


def find_model(
    path: str | os.PathLike,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The file or folder of the model that `path` names.

    The first of these that holds decides:

    1. something exists at `path`: that
    2. it is the name of a model in the package: that
    3. it is a string "user/name", no file's name, and there is no folder "user" here: the repository of the Hugging Face Hub,
       of which config.json and model.safetensors are downloaded where the cache has them not

    So a mistyped path to a file, to a folder beside others, absolute, or with a `./` before it, is never looked for elsewhere.

    Args:
        path: A path, the name of a model in the package, or a repository.
        revision: Of the Hub, as `huggingface_hub.snapshot_download` has it; so are the following.
        cache_dir: Likewise.
        token: Likewise.
        local_files_only: Likewise.

    Raises:
        FileNotFoundError: There is none; the message says where was looked.
        ImportError: A repository's name without huggingface_hub.
        ValueError: A revision of what is no repository.
    """
    name = os.fspath(path)
    here = Path(path)
    if not here.exists() and name in files.shipped():
        here = files.SHIPPED / name
    if here.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for models of the Hugging Face Hub, and {name!r} is here")
        return here
    repository = _REPOSITORY.fullmatch(name) if isinstance(path, str) and not name.endswith(_FILES) else None
    if repository is None:
        raise FileNotFoundError(f"no model at {name!r}; shipped models: {', '.join(files.shipped()) or 'none'}")
    if Path(repository[1]).exists():
        raise FileNotFoundError(
            f"no model at {name!r}; it is not looked up on the Hugging Face Hub either, since there is a {repository[1]!r} here"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"no model at {name!r}; if it is a repository of the Hugging Face Hub: pip install 'ncsr_fast[hub]'"
        ) from error
    try:
        folder = snapshot_download(  # of one commit, which two downloads of one file each might not be
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[files.CONFIG, files.WEIGHTS],
        )
    except (OSError, ValueError) as error:  # what all its errors are
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"no model at {name!r}, and none of that name from the Hugging Face Hub: {reason}") from error
    return Path(folder)
