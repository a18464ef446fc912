"""What a user calls a class -> its id."""

from __future__ import annotations

import difflib
import operator

from ecar.config import ModelConfig, plain_name

Label = int | str | None


class UnknownClass(ValueError):
    """No class of that name or id."""


class AmbiguousClass(ValueError):
    """A name that fits several classes."""


class Classes:
    """The classes of a model, prepared once: a data set may have thousands of names, and a server looks one up for each
    request."""

    def __init__(self, config: ModelConfig) -> None:
        self.names, self.count, self.null = config.class_names, config.num_classes, config.null_class
        self._plain = [plain_name(name) for name in self.names]
        self._synonyms = [{plain_name(p) for p in name.split(",")} - {""} for name in self.names]

    def id_of(self, label: Label) -> int:
        """A name, an id or None -> class id.

        A string is a name first (exactly, then without regard to case and separators), then one of its synonyms (a
        name such as "tench, Tinca tinca" lists them with commas), then an id in digits: a class that is called "7" is
        found by its name. Numbers (also numpy's) are ids.

        Raises:
            UnknownClass: a ValueError; near names are offered.
            AmbiguousClass: a ValueError: a name that fits several.
        """
        if label is None:
            return self.null
        if not isinstance(label, str):
            return self._checked(operator.index(label))
        fitting = [index for index, name in enumerate(self.names) if name == label]  # some data have it twice
        plain = plain_name(label)
        if not fitting:
            fitting = [index for index, name in enumerate(self._plain) if name and name == plain]
        if not fitting:
            fitting = [index for index, known in enumerate(self._synonyms) if plain in known]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            listed = ", ".join(f"{self.names[i]} (id {i})" for i in fitting)
            raise AmbiguousClass(f"class {label!r} fits {listed}; spell it exactly or give the id")
        if label.strip().isdecimal() and len(label) < 20:
            return self._checked(int(label))
        close = difflib.get_close_matches(plain[:40], self._plain, 3, 0.4)
        near = [self.names[self._plain.index(name)] for name in close]
        hint = f"did you mean {', '.join(near)}?" if near else f"classes: {_listed(self.names)}"
        raise UnknownClass(f"unknown class {label!r}; {hint}")

    def _checked(self, number: int) -> int:
        if not 0 <= number < self.count:
            known = f"0..{self.count - 1}" if self.count else "none: it was trained without labels"
            raise UnknownClass(f"unknown class {number}; the model's classes are {known}")
        return number


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"
