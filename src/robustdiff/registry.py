"""Kinds of one thing, found by their names.

A folder of this package holds one kind of thing, such as samplers, one file for each. The file registers its name when
it is imported, and all files of the folder are imported when a name is looked up first. An installed package adds its
own by an entry point that names a module::

    [project.entry-points."robustdiff.samplers"]
    midpoint = "midpoint_sampler"

and the module registers itself in the same way. No module has to know the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Generic, TypeVar

from robustdiff.errors import InputError, printable

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping of names to the kinds of one thing, in the order of their names.

    Arguments:
        what: What is registered, in the singular, for messages: "sampler".
        group: The group of entry points, without the package's name: "samplers".
        folder: The subpackage whose modules register themselves; named as the group by default.
    """

    def __init__(self, what: str, group: str, folder: str | None = None) -> None:
        self.what = what
        self.group = f"robustdiff.{group}"
        self.folder = f"robustdiff.{folder or group}"
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under a name.

        Raises:
            ValueError: If the name is taken by something else.
        """

        def add(entry: T) -> T:
            if self._entries.get(name, entry) is not entry:
                raise ValueError(f"there are two of the {self.what} {name}")
            self._entries[name] = entry
            return entry

        return add

    def _load(self) -> dict[str, T]:
        if not self._loaded:
            self._loaded = True  # first, since the modules may look names up
            for module in iter_modules(import_module(self.folder).__path__):
                import_module(f"{self.folder}.{module.name}")
            for point in entry_points(group=self.group):
                try:
                    point.load()
                except Exception as error:  # code of somebody else's
                    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
                    raise InputError(
                        f"the {self.what} {printable(point.name)} of the installed package "
                        f"{point.dist.name if point.dist else point.value} cannot be loaded ({printable(reason)}): "
                        "update the package, or uninstall it"
                    ) from None
        return self._entries

    def __getitem__(self, name: str) -> T:
        """Return what a name stands for.

        Raises:
            InputError: If nothing has that name.
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
