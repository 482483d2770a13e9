"""The RWKV World tokenizer: greedy longest match on bytes, 65,529 entries, any text in any language."""

from __future__ import annotations

import ast
import codecs
from collections.abc import Iterable
from functools import cache
from pathlib import Path

END = 0
"""End of text: not in the table, never produced by `encode`."""
END_OF_TURN = 261
"""The id of two newlines, which close every turn."""


@cache
def _encoder():
    import pyrwkv_tokenizer

    return pyrwkv_tokenizer.RWKVTokenizer()


@cache
def vocabulary() -> dict[int, bytes]:
    """id -> bytes, from the vocabulary file: the package's own `decode` panics on partial characters."""
    import pyrwkv_tokenizer

    table = {}
    path = Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
    for line in path.read_text(encoding="utf-8").splitlines():
        number, rest = line.split(" ", 1)
        literal = ast.literal_eval(rest.rsplit(" ", 1)[0])
        table[int(number)] = literal.encode() if isinstance(literal, str) else literal
    return table


def encode(text: str) -> list[int]:
    """Text -> ids."""
    return list(_encoder().encode(text)) if text else []


def decode_bytes(ids: Iterable[int]) -> bytes:
    """Ids -> bytes; ids without an entry (0, the image placeholder) give nothing."""
    table = vocabulary()
    return b"".join(table.get(i, b"") for i in ids)


def decode(ids: Iterable[int]) -> str:
    """Ids -> text; bytes that are no UTF-8 become U+FFFD, the rest is kept."""
    return decode_bytes(ids).decode("utf-8", "replace")


class StreamDecoder:
    """Decodes ids as they come and never gives out half a character."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is complete with this id; often empty in the middle of a character."""
        return self._decoder.decode(decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character was cut."""
        return self._decoder.decode(b"", final=True)
