"""How deep JSON is nested, known before a parser sees it.

ijson keeps the path of each level that is open: 200,000 brackets are 100 GB of paths. So the bytes that these can
take at most, by the depth and the longest key, have a bound; what is deep or has long keys is far below it.
"""

from __future__ import annotations

import itertools

_LEVEL_BYTES = len(".item") + 1
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", -1)}


class PayloadError(ValueError):
    """It is not the JSON that was expected; the text says where, and what was found."""


class Nesting:
    """Of one stream, of which it sees every chunk; it is told when an item has ended."""

    def __init__(self, limit_bytes: int) -> None:
        self._longest_bytes = self._chunk_bytes = 0  # keys of the item, and of the last chunk
        self._limit_bytes = limit_bytes
        self._depth = 0
        self._escape = b""
        self._in_text = False
        self._text_bytes = 0  # the last one: open, or it is not known yet whether it is a key

    def look(self, chunk: bytes) -> None:
        """Raises PayloadError."""
        data = self._escape + chunk
        self._escape = b"\\" if (len(data) - len(data.rstrip(b"\\"))) % 2 else b""
        plain = data.removesuffix(self._escape).replace(rb"\\", b"xx").replace(rb"\"", b"xx")
        parts = plain.split(b'"')
        if not self._in_text:
            parts.insert(0, b"")  # of the last text, which has ended
        texts_bytes, between = [len(text) for text in parts[::2]], parts[1::2]
        texts_bytes[0] += self._text_bytes
        self._in_text = len(parts) % 2 == 1
        self._text_bytes = texts_bytes[-1] if self._in_text or not between[-1].strip() else 0
        keys = (size for size, after in zip(texts_bytes, between, strict=False) if after.lstrip().startswith(b":"))
        self._chunk_bytes = max(keys, default=0)
        brackets = b"".join(between).translate(None, _NO_BRACKETS)
        self._longest_bytes = max(self._longest_bytes, self._chunk_bytes)
        depths = list(itertools.accumulate(map(_STEPS.__getitem__, brackets), initial=self._depth))
        self._depth, deepest = depths[-1], max(depths)
        if deepest**2 // 2 * (self._longest_bytes + _LEVEL_BYTES) > self._limit_bytes:
            raise PayloadError(
                f"found {deepest:,} levels and a key of {self._longest_bytes:,} bytes in one item: that is not "
                "read; take it apart where it is made, or load it whole"
            )

    def item_ended(self) -> None:
        """In the last chunk, of which it is not known where: what is longest there may be the next one's."""
        self._longest_bytes = self._chunk_bytes
