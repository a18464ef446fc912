"""What a user calls a class -> its id."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Hashable, Iterable, Sequence

from ecar.config import ModelConfig, plain_name

Label = int | str | None
_LETTERS = 40  # of an unknown name and of the known ones, for the search of near ones: half a second for 10,000


class UnknownClass(ValueError):
    """No class of that name or id."""


class AmbiguousClass(ValueError):
    """A name that fits several classes."""


class Classes:
    """The classes of a model, prepared once: a data set may have thousands of names, and a server looks one up for each
    request."""

    def __init__(self, config: ModelConfig) -> None:
        self.names, self.count, self.null = config.class_names, config.num_classes, config.null_class
        plain = [plain_name(name) for name in self.names]
        parts = [tuple(map(plain_name, name.split(","))) for name in self.names]
        self._whole = _places([own] for own in parts)  # a name with commas, as a list of it is cut
        self._longest = max(map(len, parts), default=1)
        # From the strictest reading to the loosest; the first one that some name fits decides.
        self._readings = (
            _places([name] for name in self.names),
            _places([name] for name in plain),
            _places(parts),
            _places([_letters(name)] for name in plain),
            _places(map(_letters, own) for own in parts),
        )
        self._short = {short[:_LETTERS]: name for short, name in zip(plain, self.names, strict=True)}

    def id_of(self, label: Label) -> int:
        """A name, an id or None -> class id.

        A string is a name first (exactly, then by ``plain_name``), then one of its synonyms (a name such as "tench,
        Tinca tinca" lists them with commas), then either without symbols, then an id in digits: a class that is called
        "7" is found by its name. Numbers (also numpy's) are ids.

        Raises:
            UnknownClass: a ValueError; near names are offered.
            AmbiguousClass: a ValueError: a name that fits several.
        """
        if label is None:
            return self.null
        if not isinstance(label, str):
            return self._checked(operator.index(label))
        plain = plain_name(label)
        letters = _letters(plain)
        for known, key in zip(self._readings, (label, plain, plain, letters, letters), strict=True):
            if fitting := known.get(key, ()):
                return self._only(fitting, label)
        if label.strip().isdecimal() and len(label) < 20:
            return self._checked(int(label))
        near = [self._short[name] for name in difflib.get_close_matches(plain[:_LETTERS], self._short, 3, 0.4)]
        hint = f"did you mean {', '.join(near)}?" if near else f"classes: {_listed(self.names)}"
        raise UnknownClass(f"unknown class {label!r}; {hint}")

    def ids_of(self, text: str) -> list[int]:
        """Names or ids with commas between them -> class ids, of a list of which each item is as long as it can be: a
        name may have commas itself.

        Raises:
            UnknownClass, AmbiguousClass: as ``id_of``.
        """
        parts, found = [part.strip() for part in text.split(",")], []
        plain = [plain_name(part) for part in parts]
        start = 0
        while start < len(parts):
            for end in range(min(len(parts), start + self._longest), start + 1, -1):
                if fitting := self._whole.get(tuple(plain[start:end]), ()):
                    found.append(self._only(fitting, ", ".join(parts[start:end])))
                    start = end
                    break
            else:
                if parts[start]:
                    found.append(self.id_of(parts[start]))
                start += 1
        return found

    def _only(self, fitting: Sequence[int], label: str) -> int:
        """The one class of those that fit; of several of one plain name, the one that is spelled exactly so."""
        if len(fitting) > 1:
            fitting = [i for i in fitting if self.names[i] == label] or fitting
        if len(fitting) == 1:
            return fitting[0]
        listed = ", ".join(f"{self.names[i]} (id {i})" for i in fitting[:10])
        raise AmbiguousClass(f"class {label!r} fits {listed}; spell it exactly or give the id")

    def _checked(self, number: int) -> int:
        if not 0 <= number < self.count:
            known = f"0..{self.count - 1}" if self.count else "none: it was trained without labels"
            raise UnknownClass(f"unknown class {number}; the model's classes are {known}")
        return number


def _places(keys: Iterable[Iterable[Hashable]]) -> dict[Hashable, list[int]]:
    """Key -> the classes that have it, in their order; an empty key is none."""
    found: dict[Hashable, list[int]] = {}
    for index, own in enumerate(keys):
        for key in set(own):
            if key:
                found.setdefault(key, []).append(index)
    return found


def _letters(plain: str) -> str:
    """A plain name without its symbols and marks."""
    return plain if plain.isalnum() else "".join(c for c in plain if c.isalnum())


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"
