"""A large JSON object from a stranger, read member by member: memory is bounded by a piece of it, not by the whole."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from weighbridge.storage.strict_json import InvalidJson, TruncatedJson, finite, refuse_constant, unique

_PIECE = 1 << 18
"""Bytes read at once."""
_SPACES = " \t\n\r"
_SPACE = re.compile(f"[{_SPACES}]*")
_TOKEN = len("\\uABCD")
_ENDS = frozenset(" \t\n\r,}]")
"""What may follow a value."""
_DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite)


class JsonStream:
    """Reads one JSON value from bytes. Ask for `members`, and for each of them its value, in order.

    Every method raises TruncatedJson where the bytes end before the value does, InvalidJson for everything else.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._bytes, self._ended = 0, False

    def members(self, *, names: int, count: int) -> Iterator[str]:
        """Yield the names of an object's members, of at most `names` characters, at most `count` of them.

        Take each one's value, by `value`, `string` or `members`, before asking for the next.
        """
        self._expect("{", "no JSON object")
        if self._next() == "}":
            self._at += 1
            return
        for _ in range(count):
            name = self.string(names)
            self._expect(":", "no valid JSON: no ':' after a name")
            yield name
            if self._next() == "}":
                self._at += 1
                return
            self._expect(",", "no valid JSON: no ',' after a value")
        raise InvalidJson(f"an object of more than {count:,} members, our limit")

    def string(self, most: int) -> str:
        """A text of at most `most` characters."""
        if not self.is_string():
            raise InvalidJson(f"no valid JSON: no text where one belongs, at byte {self._where():,}")
        return str(self.value(most + 2))

    def value(self, most: int) -> Any:
        """Any value that is written in at most `most` characters."""
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > most:
                    raise self._too_long(most) from error
                if self._ended:
                    raise self._failed(error) from error
            except (RecursionError, ValueError) as error:  # ValueError: a name twice, NaN, a number of 5,000 digits
                raise (
                    error if isinstance(error, InvalidJson) else InvalidJson(f"no acceptable JSON: {error}")
                ) from error
            else:
                # A number may go on behind what is read, after its point too.
                if self._ended or self._text[end : end + 1] in _ENDS or len(self._text) - end > _TOKEN:
                    break
            self._more()
        if end - self._at > most:
            raise self._too_long(most)
        self._at = end
        return value

    def is_object(self) -> bool:
        """Whether an object begins here."""
        return self._next() == "{"

    def is_string(self) -> bool:
        """Whether a text begins here."""
        return self._next() == '"'

    def end(self) -> None:
        """Prove that nothing follows."""
        try:
            self._next()
        except TruncatedJson:
            return
        raise InvalidJson(f"more than one value: something follows at byte {self._where():,}")

    def _next(self) -> str:
        """The next character that is no space; not taken."""
        while True:
            if (next_one := self._text[self._at : self._at + 1]) and next_one not in _SPACES:
                return next_one
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # always matches
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                raise TruncatedJson(f"it ends after {self._bytes:,} bytes, inside an object")
            self._more()

    def _expect(self, character: str, otherwise: str) -> None:
        if self._next() != character:
            raise InvalidJson(f"{otherwise}, at byte {self._where():,}")
        self._at += 1

    def _more(self) -> None:
        """Read on: as much again as is held, so that a long value is not begun too often."""
        held = self._text[self._at :]
        data = self._stream.read(max(_PIECE, len(held)))
        self._bytes += len(data)
        self._ended = not data
        try:
            self._text, self._at = held + self._decoder.decode(data, final=not data), 0
        except UnicodeDecodeError as error:
            if not data:
                raise TruncatedJson(f"it ends after {self._bytes:,} bytes, inside a character") from error
            raise InvalidJson(f"no valid JSON: not UTF-8 near byte {self._where():,}") from error

    def _where(self) -> int:
        """About where the reader is; exact for ASCII."""
        return self._bytes - (len(self._text) - self._at)

    def _failed(self, error: json.JSONDecodeError) -> InvalidJson:
        text = self._text.rstrip()
        if error.msg.startswith("Unterminated string") or len(text) - error.pos <= _TOKEN:
            return TruncatedJson(f"it ends after {self._bytes:,} bytes, inside an object")
        return InvalidJson(f"no valid JSON: {error.msg} near byte {self._where():,}")

    def _too_long(self, most: int) -> InvalidJson:
        return InvalidJson(f"a value of more than {most:,} characters at byte {self._where():,}, larger than our limit")
