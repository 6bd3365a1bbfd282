"""A search for files in a folder that also reports everything it leaves out."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

_NAMED = 3  # files of each kind that a message names


class Search:
    """The files below a folder with given suffixes, and everything else in the folder, by kind.

    Links are followed. A file that several links lead to is found once, at its own path if that is in the folder.

    Args:
        folder: The folder to search.
        suffixes: The suffixes, in lower case and with the dot.
    """

    def __init__(self, folder: Path, suffixes: Collection[str]) -> None:
        self.found: list[Path] = []
        self.left_out: dict[str, list[Path]] = {}
        self.origins = [folder]  # every found file is one of these or below one, by its real path
        self._folder, self._suffixes = folder, suffixes
        self._places: set[tuple[int, int]] = set()  # device and inode of files and folders
        self._links: list[Path] = []
        self._enter(folder, linked=False)
        while self._links:  # after all files that are not links
            self._follow(self._links.pop(0))

    def account(self) -> str:
        """A line about the files left out: the number of each kind, and the first few names."""
        names = {kind: [str(path.relative_to(self._folder)) for path in sorted(paths)] for kind, paths in self.left_out.items()}
        return "; ".join(f"{len(found)} {kind} ({named(found)})" for kind, found in names.items())

    def _enter(self, folder: Path, linked: bool) -> None:
        try:
            if not self._is_new(folder.stat()):
                self._leave("that are listed under another path", folder)
                return
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._leave(f"that cannot be opened: {error.strerror}", folder)
            return
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                self._leave("hidden", path)
            elif entry.is_symlink():
                self._links.append(path)
            elif entry.is_dir():
                self._enter(path, linked)
            else:
                self._add(path, entry.stat(), linked)

    def _follow(self, link: Path) -> None:
        try:
            status = link.stat()
        except OSError:
            self._leave("links that lead nowhere", link)
            return
        self.origins.append(link)
        if stat.S_ISDIR(status.st_mode):
            self._enter(link, linked=True)
        else:
            self._add(link, status, linked=True)

    def _add(self, path: Path, status: os.stat_result, linked: bool) -> None:
        if not stat.S_ISREG(status.st_mode):
            self._leave("that are neither files nor folders", path)
        elif path.suffix.lower() not in self._suffixes:
            self._leave(f"that end in {path.suffix}" if path.suffix else "whose names have no ending", path)
        elif not self._is_new(status) and linked:  # hard links are listed by every name
            self._leave("that are listed under another path", path)
        else:
            self.found.append(path)

    def _is_new(self, status: os.stat_result) -> bool:
        """True if a file or folder was not met before; it counts as met from now on."""
        place = (status.st_dev, status.st_ino)
        known = place in self._places
        self._places.add(place)
        return not known

    def _leave(self, kind: str, path: Path) -> None:
        self.left_out.setdefault(kind, []).append(path)


def named(names: Iterable[str], count: int = _NAMED) -> str:
    """The first `count` names as a text, for a message."""
    names = list(names)
    return ", ".join(map(repr, names[:count])) + (", …" if len(names) > count else "")
