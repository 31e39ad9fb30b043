"""Reading a model's description so that nothing in it is silently ignored."""

from collections.abc import Collection, Mapping
from typing import Any


class Fields:
    """The fields of a description, and which of them have been looked at.

    Args:
      where: how errors call the description.
      values: its fields.
    """

    def __init__(self, where: str, values: Mapping[str, Any]):
        self.where, self._values = where, values
        self._seen: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field; absent and null are both the default."""
        self._seen.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def nullable(self, name: str, default: Any) -> Any:
        """The value of a field for which null means "none", and only absence the default."""
        self._seen.add(name)
        return self._values.get(name, default)

    def need(self, name: str) -> Any:
        """As `get`; an absent field is a ValueError."""
        if (value := self.get(name)) is None:
            raise ValueError(f"{self.where}: field {name!r} is missing")
        return value

    def only(self, name: str, *supported: Any) -> None:
        """Refuses a field that is there with a value other than these."""
        value = self.get(name)
        if value is not None and value not in supported:
            raise self.unsupported(name, value, supported)

    def nothing_else(self, harmless: Collection[str] = ()) -> None:
        """Refuses what nobody looked at, unless it is switched off or known to be harmless."""
        for name, value in self._values.items():
            off = value is None or value is False
            if not (off or name in self._seen or name in harmless):
                raise ValueError(
                    f"{self.where}: field {name!r} ({value!r}) is not known for this kind of "
                    "model, and might change what it computes; if it does not, delete it"
                )

    def unsupported(self, name: str, value: Any, supported: Collection[Any]) -> ValueError:
        """The error for a value that the decoder has nothing for."""
        listed = ", ".join(v if isinstance(v, str) else repr(v) for v in supported) or "none"
        return ValueError(
            f"{self.where}: {name} is {value!r}, which is not supported; supported: {listed}"
        )
