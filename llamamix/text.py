"""Text out of bytes, and out of tokens: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from .errors import ParamsError


def decode_utf8(data: bytes, name: str) -> str:
    """Bytes as text, without a byte order mark, lines ended by a line feed. Raises ParamsError for what is not UTF-8.

    name  where they are from
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParamsError(
            f"{name} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); convert it, for example with"
            " iconv."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


class TextStream:
    """Turns the bytes of tokens into text.

    Bytes that may be the beginning of a character, and text that may be the beginning of a stop string, wait for what
    comes next. Bytes that are no character become U+FFFD.
    """

    def __init__(self, stop: str | Iterable[str] = ()) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        for text in self._stop:
            if not isinstance(text, str) or not text:
                raise ParamsError(f"A stop string must be a text of a character or more, not {text!r}.")
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""  # not given out yet
        self.stopped: bool = False

    def feed(self, piece: bytes) -> str:
        """The text that is certain after a further piece; ``stopped`` is True once a stop string was complete."""
        return self._advance(self._decoder.decode(piece))

    def finish(self) -> str:
        """The text that was still waiting."""
        text = self._advance(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text, self._text = text + self._text, ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        self._text += text
        found = [i for i in map(self._text.find, self._stop) if i >= 0]
        if found:
            self.stopped = True
            return self._text[: min(found)]
        n_wait = max(map(self._n_begun, self._stop), default=0)
        n_out = len(self._text) - n_wait
        out, self._text = self._text[:n_out], self._text[n_out:]
        return out

    def _n_begun(self, stop: str) -> int:
        """How many characters at the end of the text are the beginning of a stop string."""
        for n in range(min(len(stop) - 1, len(self._text)), 0, -1):
            if self._text.endswith(stop[:n]):
                return n
        return 0
