"""Kinds of files given instead of a checkpoint, recognised by their first bytes, with advice for each."""

from __future__ import annotations

import os
import pickletools
import zipfile
from pathlib import Path

_HEAD = 512  # bytes that a kind is recognised by
_PICKLE = 2**24  # bytes of a pickle that are searched
_UNPACK = "unpack it and give the checkpoint inside"
_SOURCE = "give the PyTorch checkpoint that it was made from"
_MAGIC = {
    b"version https://git-lfs.github.com/spec/": (
        "a Git LFS pointer, a few lines instead of the file: get the file itself with `git lfs pull`, or download it"
    ),
    b"\x93NUMPY": f"a NumPy array: {_SOURCE}",
    b"\x89HDF\r\n\x1a\n": f"an HDF5 file, as Keras writes: {_SOURCE}",
    b"GGUF": f"a GGUF file: {_SOURCE}",
    b"7767517": f"a network of ncnn: {_SOURCE}",
    b"\x1f\x8b": f"a gzip archive: {_UNPACK}",
    b"BZh": f"a bzip2 archive: {_UNPACK}",
    b"\xfd7zXZ": f"an xz archive: {_UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive: {_UNPACK}",
    b"Rar!": f"a RAR archive: {_UNPACK}",
    b"\x89PNG": "a PNG image: give the model's file",
    b"\xff\xd8\xff": "a JPEG image: give the model's file",
    b"%PDF": "a PDF document: give the model's file",
}


def is_safetensors(path: str | os.PathLike) -> bool:
    """True for a file that begins as the safetensors format does: the length of a JSON text, and the text."""
    head = _head(path)
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000


def kind_of(path: str | os.PathLike) -> str | None:
    """The kind of a file that is not a checkpoint, and advice, to follow "it is"; None if unknown."""
    head = _head(path)
    if not head:
        return "empty (0 bytes): download or save it again"
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if head[257:262] == b"ustar":
        return f"a tar archive: {_UNPACK}"
    if Path(path).suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] == b"\x12"):  # ir_version, producer_name
        return f"an ONNX graph: {_SOURCE}"
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None) or _kind_of_text(head)


def names_in_pickle(path: str | os.PathLike) -> list[str]:
    """The functions and classes that a pickle or a PyTorch archive names; none of them is called."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                data = archive.open(name).read(_PICKLE)
        else:
            with open(path, "rb") as file:
                data = file.read(_PICKLE)
    except (OSError, StopIteration, zipfile.BadZipFile):
        return []
    names: list[str] = []
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(argument.replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    except (ValueError, UnicodeDecodeError):  # not a pickle, or truncated
        return names
    return names


def _head(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _kind_of_text(head: bytes) -> str | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return (
            "a web page; the download probably needs a click or a log-in first: open the link in a browser and save the "
            "file itself"
        )
    try:
        text = start[:60].decode("ascii")
    except UnicodeDecodeError:
        return None
    if not text or not all(character.isprintable() or character.isspace() for character in text):
        return None
    return f"a text that begins with {text.splitlines()[0]!r}: give the model's file"


def _kind_of_zip(path: str | os.PathLike) -> str | None:
    if not zipfile.is_zipfile(path):
        return "a truncated archive, such as an interrupted download leaves: download or copy it again"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    parts = {name.partition("/")[2] for name in names}
    if "constants.pkl" in parts:
        return (
            "a TorchScript program, which is more than tensors and is not executed: save its weights, "
            "torch.save(torch.jit.load(file).state_dict(), …)"
        )
    if "data.pkl" in parts:
        return None  # PyTorch's
    if names and all(name.endswith(".npy") for name in names):
        return f"an archive of NumPy arrays (.npz): {_SOURCE}"
    return f"a zip archive ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}): {_UNPACK}"
