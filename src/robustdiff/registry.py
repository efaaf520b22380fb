"""Registries of implementations by name, such as the samplers.

Each registry has a folder of this package, whose modules register implementations when they are imported. All modules
of the folder are imported when a name is first looked up. An installed package adds implementations by an entry point
that names a module::

    [project.entry-points."robustdiff.samplers"]
    midpoint = "midpoint_sampler"

which registers them in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Generic, TypeVar

from robustdiff.errors import InputError, first_line, printable

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping of names to registered entries, sorted by name.

    Args:
        what: The word for an entry in messages, in the singular, such as "sampler".
        group: The group of entry points, without the prefix ``robustdiff.``, such as "samplers".
        folder: The subpackage with the modules that register entries; by default the name of the group.
    """

    def __init__(self, what: str, group: str, folder: str | None = None) -> None:
        self.what = what
        self.group = f"robustdiff.{group}"
        self.folder = f"robustdiff.{folder or group}"
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a class or function under a name.

        Raises:
            ValueError: If the name is taken by another entry.
        """

        def add(entry: T) -> T:
            if self._entries.get(name, entry) is not entry:
                raise ValueError(f"there are two of the {self.what} {name}")
            self._entries[name] = entry
            return entry

        return add

    def _load(self) -> dict[str, T]:
        if not self._loaded:
            self._loaded = True  # set first, because the modules may look up names
            try:
                self._import_all()
            except BaseException:  # an interrupt too: the next look-up goes on with the rest
                self._loaded = False
                raise
        return self._entries

    def _import_all(self) -> None:
        for module in iter_modules(import_module(self.folder).__path__):
            import_module(f"{self.folder}.{module.name}")
        for point in entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:  # third-party code may raise any error
                reason = first_line(error)
                raise InputError(
                    f"the {self.what} {printable(point.name)} of the installed package "
                    f"{point.dist.name if point.dist else point.value} cannot be loaded ({printable(reason)}): "
                    "update the package, or uninstall it"
                ) from None

    def __getitem__(self, name: str) -> T:
        """Return the entry with a name.

        Raises:
            InputError: If no entry has this name.
        """
        entries = self._load()
        if name not in entries:
            raise InputError(f"unknown {self.what} {printable(str(name)[:100])!r}: use one of {', '.join(self)}")
        return entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())
