"""Models by name: the rules that tell a path from a repository, and the Hugging Face Hub, in a cache laid out here."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from support import assert_same_weights, tiny_model

from ncsr_fast import NCSR, RRDB
from ncsr_fast.card import model_card
from ncsr_fast.hub import find_model, push_to_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def downloads(monkeypatch):
    """What the Hub was asked for, in place of asking."""
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(tiny_model().save_pretrained(Path("downloaded")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def lay_out_cache(save, name: str = "user/model", branch: str = "main") -> Path:
    """The Hub's cache with one repository, as huggingface_hub leaves it."""
    repository = Path("cache") / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / branch).write_text(COMMIT)
    save(repository / "snapshots" / COMMIT)
    return Path("cache")


@pytest.mark.slow
def test_a_repository_from_the_cache():
    model = tiny_model()
    cache = lay_out_cache(model.save_pretrained)
    again = NCSR.from_pretrained("user/model", cache_dir=cache, local_files_only=True, engine="plain")
    assert_same_weights(model, again)
    assert again.engine == "plain"
    assert_same_weights(model, NCSR.from_pretrained("user/model", cache_dir=cache, local_files_only=True, revision=COMMIT))
    for absent in ({"revision": "other"}, {"cache_dir": "empty"}):
        with pytest.raises(FileNotFoundError, match="at 'user/model', and the Hugging Face Hub gave none: "):
            NCSR.from_pretrained("user/model", **({"cache_dir": cache, "local_files_only": True} | absent))


def test_a_generator_from_the_cache():
    model = tiny_model()
    cache = lay_out_cache(model.encoder.save_pretrained)
    assert_same_weights(model.encoder, RRDB.from_pretrained("user/model", cache_dir=cache, local_files_only=True))


def test_what_the_hub_is_asked_for(downloads):
    assert_same_weights(tiny_model(), NCSR.from_pretrained("user/model", revision="v1", cache_dir="c", token="hf_x"))
    ((name, options),) = downloads
    assert name == "user/model" and options["allow_patterns"] == ["config.json", "model.safetensors"]
    assert (options["revision"], options["cache_dir"], options["token"]) == ("v1", "c", "hf_x")


def test_what_is_here_comes_first(downloads):
    tiny_model().save_pretrained("user/model")
    NCSR.from_pretrained("user/model")
    NCSR.from_pretrained("ncsr-compact-x4")
    assert not downloads
    tiny_model().save_pretrained("ncsr-compact-x4")
    assert_same_weights(tiny_model(), NCSR.from_pretrained("ncsr-compact-x4"))
    with pytest.raises(
        ValueError, match="revision='v1' is for models of the Hugging Face Hub, but 'user/model' is a local model"
    ):
        NCSR.from_pretrained("user/model", revision="v1")


@pytest.mark.parametrize(
    "path",
    [
        "", "name", "./user/model", "/user/model", "~/model", "../model", "a/b/c", "user/model/", "user/net.pth",
        "user/x.safetensors", "runs/model", "user\\model", "user/m odel", Path("user/model"),
    ],
    ids=repr,
)  # fmt: skip
def test_paths_that_are_not_there_are_never_downloaded(path, downloads):
    Path("runs").mkdir()
    with pytest.raises(FileNotFoundError, match="no model at "):
        find_model(path)
    assert not downloads


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"no model at 'user/model'; .* pip install 'ncsr_fast\[hub\]'"):
        NCSR.from_pretrained("user/model")
    with pytest.raises(FileNotFoundError):
        NCSR.from_pretrained("model")


class Uploads:
    """Stands for `huggingface_hub.HfApi`: keeps what it is given, and the files of each upload in the folder "uploaded"."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, **options):
        self.calls.append(("api", options))
        return self

    def create_repo(self, repository, **options):
        self.calls.append(("create_repo", repository, options))

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload_folder", options))
        shutil.copytree(folder_path, "uploaded")
        return SimpleNamespace(commit_url="the commit")


@pytest.fixture
def uploads(monkeypatch):
    made = Uploads()
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    return made


TEXTS = {"data": "Twelve photographs of a cat.", "terms": "For cats alone."}


def test_an_upload(uploads):
    model = tiny_model()
    options = {"private": True, "token": "secret", "revision": "branch", "commit_message": "First"}
    assert model.push_to_hub("user/mine", license="mit", **TEXTS, **options) == "the commit"
    assert uploads.calls == [
        ("api", {"token": "secret", "library_name": "ncsr_fast"}),
        ("create_repo", "user/mine", {"private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "user/mine", "revision": "branch", "commit_message": "First"}),
    ]
    assert sorted(path.name for path in Path("uploaded").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_same_weights(model, NCSR.from_pretrained("uploaded"))


def test_the_card_of_an_upload(uploads):
    """The Hub's own reader finds the metadata, and the sums are those of the files beside it."""
    model = tiny_model()
    push_to_hub(model, "user/mine", license="mit", **TEXTS)
    card = huggingface_hub.ModelCard.load(Path("uploaded", "README.md"))
    assert card.data.license == "mit" and card.data.library_name == "ncsr_fast" and "super-resolution" in card.data.tags
    assert card.data.pipeline_tag == "image-to-image"
    for text in (*TEXTS.values(), "# mine", 'from_pretrained("user/mine")', model.describe()):
        assert text in card.text
    for name in ("config.json", "model.safetensors"):
        content = Path("uploaded", name).read_bytes()
        assert f"| `{name}` | {len(content)} | `{hashlib.sha256(content).hexdigest()}` |" in card.text


@pytest.mark.parametrize("absent", ["data", "terms"])
def test_a_card_without_data_or_terms(absent, uploads):
    with pytest.raises(ValueError, match=f"{absent} must be a text"):
        push_to_hub(tiny_model(), "user/mine", **{**TEXTS, absent: " "})
    assert not uploads.calls
    with pytest.raises(FileNotFoundError):
        model_card(tiny_model(), "nowhere", "user/mine", **TEXTS)


def test_the_hub_cannot_be_reached(uploads, monkeypatch):
    """The error of a connection is its HTTP client's own, neither OSError nor huggingface_hub's."""

    class ConnectError(Exception):
        pass

    def create_repo(*_, **__):
        raise error

    monkeypatch.setattr(uploads, "create_repo", create_repo)
    error = ConnectError("[Errno -2] Name or service\n not known")
    with pytest.raises(OSError, match=r"^no upload to 'user/mine' on .* Hub: \[Errno -2\] Name or service not known$"):
        push_to_hub(tiny_model(), "user/mine", **TEXTS)
    error = PermissionError("401")
    with pytest.raises(PermissionError, match="^401$"):
        push_to_hub(tiny_model(), "user/mine", **TEXTS)


@pytest.mark.parametrize("license", ["", "CC BY-NC-SA 4.0", "other\nfoo: bar", "it's: #x", "[mit]", None])
def test_licences_that_break_the_metadata(license, uploads):
    with pytest.raises(ValueError, match="^license must be an identifier of the Hub's list, such as .*, not "):
        push_to_hub(tiny_model(), "user/mine", license=license, **TEXTS)
    assert not uploads.calls


@pytest.mark.parametrize("name, title", [("runs/mine/", "# mine"), ("a\nb", None), ("", None), ("/", None)])
def test_the_title_of_a_card(name, title, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    if title is None:
        with pytest.raises(ValueError, match="^name must be a line of text, not "):
            model_card(model, tmp_path, name, **TEXTS)
    else:
        assert title in model_card(model, tmp_path, name, **TEXTS).splitlines()


def test_uploads_that_cannot_be(uploads, monkeypatch):
    with pytest.raises(ValueError, match='repository must be of the form "user/name", not'):
        push_to_hub(tiny_model(), "mine", **TEXTS)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"uploading needs huggingface_hub: pip install 'ncsr_fast\[hub\]'"):
        push_to_hub(tiny_model(), "user/mine", **TEXTS)
