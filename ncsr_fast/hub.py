"""Models by name: existing files and folders, the models in the package, and models of the Hugging Face Hub, there and back."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ncsr_fast import files
from ncsr_fast.card import CARD, model_card

if TYPE_CHECKING:
    from ncsr_fast.model import NCSR

_REPOSITORY = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)", re.ASCII)  # user/name
_FILES = (".pth", ".pt", ".ckpt", ".state", ".safetensors")  # a name with such an ending means a file


def find_model(
    path: str | os.PathLike,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The file or folder of the model that `path` names.

    The first of these rules that applies decides:

    1. If something exists at `path`, it is the model.
    2. If `path` is the name of a model in the package, it is that model.
    3. If `path` is a string "user/name" that is not a file's name, and there is no folder "user" here, it is a repository of
       the Hugging Face Hub. Its config.json and model.safetensors are downloaded unless they are cached.

    So a mistyped path is never searched for on the Hub if it is absolute, begins with `./`, names a file, or begins with an
    existing folder.

    Args:
        path: A path, the name of a model in the package, or a repository.
        revision: Revision of the Hub repository, as in `huggingface_hub.snapshot_download`.
        cache_dir: As in `huggingface_hub.snapshot_download`.
        token: As in `huggingface_hub.snapshot_download`.
        local_files_only: As in `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: There is no such model; the message says where it was searched for.
        ImportError: `path` is a repository, and huggingface_hub is not installed.
        ValueError: `revision` is given, and `path` is not a repository.
    """
    name = os.fspath(path)
    if not name:
        raise FileNotFoundError(f"no model at ''; shipped models: {', '.join(files.shipped()) or 'none'}")
    here = Path(path)
    if not here.exists() and name in files.shipped():
        here = files.SHIPPED / name
    if here.exists():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for models of the Hugging Face Hub, but {name!r} is a local model")
        return here
    repository = _REPOSITORY.fullmatch(name) if isinstance(path, str) and not name.endswith(_FILES) else None
    if repository is None:
        raise FileNotFoundError(f"no model at {name!r}; shipped models: {', '.join(files.shipped()) or 'none'}")
    if Path(repository[1]).exists():
        raise FileNotFoundError(
            f"no model at {name!r}; it is not searched for on the Hugging Face Hub, because {repository[1]!r} exists here"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"no model at {name!r}; if it is a repository of the Hugging Face Hub: pip install 'ncsr_fast[hub]'"
        ) from error
    try:
        folder = snapshot_download(  # both files of one commit; two downloads might be of two commits
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=[files.CONFIG, files.WEIGHTS],
        )
    except (OSError, ValueError) as error:  # base classes of all its errors
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"no model at {name!r}, and the Hugging Face Hub gave none: {reason}") from error
    return Path(folder)


def push_to_hub(
    model: NCSR,
    repository: str,
    *,
    data: str,
    terms: str,
    license: str = "other",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload of a model by ncsr_fast",
) -> str:
    """Upload a model to a repository of the Hugging Face Hub, with a card; the repository is made if there is none.

    The repository gets config.json, model.safetensors and README.md, the card (`ncsr_fast.card.model_card`), in one commit. A
    card that it has already is replaced.

    Args:
        model: The model (`NCSRConfig` only).
        repository: "user/name".
        data: As of `model_card`: which images the model was trained on.
        terms: As of `model_card`: what the weights may be used for.
        license: As of `model_card`.
        private: Of a repository that is made, as in `huggingface_hub.HfApi.create_repo`.
        token: As in `huggingface_hub.HfApi`; None is that of `hf auth login`.
        revision: Branch to commit to; None is the main one.
        commit_message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: `repository` is not of the form "user/name", or `data` or `terms` is empty.
        ImportError: huggingface_hub is not installed.
        OSError: The Hub refused, or cannot be reached, whatever the class of its HTTP client's error.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f'repository must be of the form "user/name", not {repository!r}')
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("uploading needs huggingface_hub: pip install 'ncsr_fast[hub]'") from error
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        card = model_card(model, folder, repository, data=data, terms=terms, license=license)
        (Path(folder) / CARD).write_text(card, encoding="utf-8")
        api = HfApi(token=token, library_name="ncsr_fast")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message=commit_message)
        except (OSError, ValueError):  # base classes of all of huggingface_hub's own errors
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"no upload to {repository!r} on the Hugging Face Hub: {reason}") from error
    return str(commit.commit_url)
