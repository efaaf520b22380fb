"""A reader of untrusted YAML.

A short YAML text can be very large when read, because aliases expand exponentially, or ambiguous, for example with
duplicate keys. The reader returns dictionaries, lists, strings, numbers, booleans and None, and refuses tags, duplicate
keys, and values beyond bounds.

1e-4 is a number, as in YAML 1.2. (YAML 1.1, as PyYAML reads it, has a point and a sign in numbers with exponents:
1.0e-4.) A field that holds text still takes it as it is written (:func:`text_of`), since a name may look like it.
Numbers that YAML 1.1 has in base 8 or 60, as 010 and 1:30, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from robustdiff.errors import InputError, first_line, printable

__all__ = ["parse_yaml", "read_yaml", "split_assignment", "text_of"]

MOST_BYTES = 2**18
MOST_VALUES = 20_000  # with all aliases expanded
DEEPEST = 40
_EXPONENTIAL = "exponential:float"  # the tag of numbers such as 1e-4
_OTHER_BASE = re.compile(r"[-+]?0[0-9_]+|.*:.*")
LONGEST_NUMBER = 100  # characters: parsing a Python integer takes quadratic time


class _Refused(yaml.YAMLError):
    """An error for well-formed YAML that this reader refuses."""

    def __init__(self, message: str, mark: Any) -> None:
        super().__init__(f"{message} (line {mark.line + 1})")


class _Exponential(float):
    """A number with an exponent, such as 1e-4, and its text."""

    def __new__(cls, text: str) -> _Exponential:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def text_of(value: Any) -> Any:
    """Return the text of a number with an exponent that was read from YAML, and any other value as it is."""
    return value.text if isinstance(value, _Exponential) else value


class _Loader(yaml.SafeLoader):
    """A safe loader that counts the values to which aliases expand, and refuses ambiguous or oversized values."""

    # Dates are read as strings, because no field is a date and a name may look like one.
    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._depth = self._reached = 0
        self._extents: dict[int, tuple[int, int]] = {}  # number of values and height of each composed node

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        mark = event.start_mark
        if getattr(event, "tag", None) not in (None, "!"):
            raise _Refused(f"the tag {event.tag[:100]} is not read here: leave it out", mark)
        before, outer, self._reached = self._values, self._reached, self._depth
        self._depth += 1
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._extents:
                raise _Refused(f"*{str(event.anchor)[:100]} stands within its own anchor", mark)
            values, height = self._extents[id(node)]
            self._values += values
            self._reached = self._depth - 1 + height
            self._bound(mark)
        else:
            self._values += 1
            self._reached = self._depth
            self._bound(mark)
            node = super().compose_node(parent, index)
            self._extents[id(node)] = self._values - before, self._reached - (self._depth - 1)
            self._check(node)
        self._depth -= 1
        self._reached = max(self._reached, outer)
        return node

    def _bound(self, mark: Any) -> None:
        if self._values > MOST_VALUES:
            raise _Refused(f"more than {MOST_VALUES:,} values, with aliases written out", mark)
        if self._reached > DEEPEST:
            raise _Refused(f"nested more than {DEEPEST} deep", mark)

    def _check(self, node: yaml.Node | None) -> None:
        """Refuse duplicate keys, keys that are not scalars, and numbers with too many digits or in an old notation."""
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
            if len(node.value) > LONGEST_NUMBER:
                raise _Refused(f"a number of {len(node.value)} characters", node.start_mark)
            if _OTHER_BASE.fullmatch(node.value):
                message = f"{node.value} is in base {60 if ':' in node.value else 8} in YAML 1.1, and not in 1.2"
                raise _Refused(f"{message}: write a number without leading zeros, or text in quotes", node.start_mark)
        elif isinstance(node, yaml.MappingNode):
            keys: set[Hashable] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise _Refused("a key that is a list or a mapping", key.start_mark)
                if key.tag == _EXPONENTIAL:  # keys are names
                    key.tag = "tag:yaml.org,2002:str"
                merge = key.tag == "tag:yaml.org,2002:merge"
                name = "<<" if merge else self.construct_object(key)
                if name in keys:
                    raise _Refused(f"the key {str(name)[:100]!r} is given twice", key.start_mark)
                keys.add(name)


_Loader.add_implicit_resolver(
    _EXPONENTIAL, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
)
_Loader.add_constructor(_EXPONENTIAL, lambda loader, node: _Exponential(node.value))


def _short(message: str) -> str:
    return printable(message[:200])


def split_assignment(text: str, option: str, example: str) -> tuple[str, str]:
    """Return the key of an assignment ``KEY=VALUE``, and the text of its value.

    Args:
        text: The assignment, whose key may have several parts with dots between them.
        option: The option that it is the value of, for the message.
        example: Another assignment, for the message.

    Raises:
        InputError: If there is no "=", or a part of the key is empty.
    """
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f"{option} {text}: write it as KEY=VALUE, as in {option} {example}")
    return key, value


def parse_yaml(text: str | bytes, source: str) -> Any:
    """Parse a YAML text into a dictionary, list, string, number, boolean, or None.

    Args:
        text: The text.
        source: The name of the text in messages.

    Raises:
        InputError: If the text is not YAML, or has tags, duplicate keys, too many values, or too deep nesting.
    """
    source = printable(source)
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        loader = _Loader(decoded)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _Refused as error:
        raise InputError(f"{source}: not YAML that is read here: {printable(str(error))}") from None
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        raise InputError(f"{source}: not YAML: {_short(error.problem or str(error))}{where}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # such as 0x_, or an invalid byte
        raise InputError(f"{source}: not YAML: {_short(first_line(error))}") from None


def read_yaml(path: Path) -> Any:
    """Parse a YAML file as :func:`parse_yaml` does; an empty one is None.

    Raises:
        InputError: If the file is missing or unreadable, is larger than 256 KiB, or is refused by :func:`parse_yaml`.
    """
    source = printable(path)
    try:
        if not path.is_file():  # opening a pipe would block
            raise InputError(f"no file {source}: give a YAML file")
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from None
    if len(raw) > MOST_BYTES:
        raise InputError(f"{source} has more than {MOST_BYTES:,} bytes: a file of this kind has few lines")
    return parse_yaml(raw, source)
