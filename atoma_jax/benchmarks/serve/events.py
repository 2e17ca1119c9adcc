"""Server-sent events out of a stream of bytes, however it is cut. Knows nothing of what is in them."""


class EventReader:
    """Takes bytes as they come; gives the data of every event that is whole."""

    def __init__(self) -> None:
        """At the beginning of a stream."""
        self._left = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The events that end within `received`, their lines of data joined. Comments and other fields are left out."""
        events: list[bytes] = []
        *lines, self._left = (self._left + received).split(b"\n")
        for ended in lines:
            line = ended.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
