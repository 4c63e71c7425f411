"""What the configs of the parts share: fields are checked, and a field that cannot be honoured is an error."""

import dataclasses
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from flax_qformer.errors import InputError

LARGEST = 2**16
"""Default bound on sizes in a config, so that a damaged one is an error and not an endless loop."""


@dataclass(frozen=True)
class PartConfig:
    """Base of the configs of a pipeline's parts. Fields have the names and defaults of diffusers 0.32.2.

    Attributes:
      FIXED: fields of upstream that must have one of the listed values here.
      IGNORED: fields of upstream that do not change the computation.
    """

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if not _fits(value, hints[field.name]):
                kind = field.type.__name__ if isinstance(field.type, type) else field.type
                raise InputError(f"{type(self).__name__}.{field.name} is {value!r:.60}; it must be {kind}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the config from the contents of a `config.json`.

        Raises:
          InputError: a field is unknown, has a wrong type, or a value that is not supported.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name in known or name in cls.IGNORED or name.startswith("_"):
                continue
            if name not in cls.FIXED:
                raise InputError(f"{cls.__name__} has an unknown field {name!r:.60}, here {value!r:.60}")
            if value not in cls.FIXED[name]:
                supported = " or ".join(map(repr, cls.FIXED[name]))
                raise InputError(f"{cls.__name__}.{name} is {value!r:.60}; only {supported} is supported")
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """The config as upstream writes it, every field spelled out."""
        return dataclasses.asdict(self)

    def _check_numbers(self, *names: str, low: int = 1, high: int = LARGEST) -> None:
        """Raise InputError unless the fields, or all items of them, are from `low` to `high`."""
        for name in names:
            if not all(low <= number <= high for number in _items(getattr(self, name))):
                self._refuse(name, f"from {low} to {high}")

    def _check_choices(self, name: str, choices: Collection[Any]) -> None:
        """Raise InputError unless a field, or all items of it, are among the choices."""
        if not all(item in choices for item in _items(getattr(self, name))):
            self._refuse(name, " or ".join(map(repr, choices)))

    def _refuse(self, name: str, supported: str) -> None:
        value = repr(getattr(self, name))
        raise InputError(f"{type(self).__name__}.{name} is {value:.80}; it must be {supported}")


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has the type of a field: bool, int, float, str, None, tuples and unions of these."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(None) if hint is None else hint)
