"""Loads the tokenizer of a checkpoint with the `tokenizers` library, and decodes tokens.

`TokenDecoder` decodes token ids one at a time. The library's `decode` needs all ids at once, and
its `DecodeStream` fails on bytes that never become a character. This module does not need torch.
"""

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tolhouse.errors import InvalidArgumentError, NotFoundError

TOKENIZER = "tokenizer.json"
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# The characters that stand for bytes in byte-level vocabularies.
_BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_MAX_UNIT = 8  # the most tokens that are decoded together while their text is not final
_CACHED = 1 << 16  # the number of cached texts


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer in file `path`. Its settings of truncation and padding are ignored.

    Raises InvalidArgumentError if the file is malformed, if an id is not below `vocab_size`, or if
    the tokenizers library loads an added token with another id than the file's.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no tokenizer at {path}")
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        tokenizer = Tokenizer.from_buffer(data)
        added = json.loads(data).get("added_tokens") or ()
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception
        raise InvalidArgumentError(f"{path} is not a tokenizer.json: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for token in added:
        content, wanted = token["content"], token["id"]
        if (loaded := tokenizer.token_to_id(content)) != wanted:
            how = "leaves it out" if loaded is None else f"loads it with id {loaded}"
            advice = "ids of added tokens must be unique and follow the vocabulary without a gap"
            reason = f"but the tokenizers library {how}: {advice}"
            raise InvalidArgumentError(f"{path} gives token {content!r} the id {wanted}, {reason}")
    ids = Counter(tokenizer.get_vocab().values())
    if shared := [i for i, count in ids.items() if count > 1]:
        tokens = sorted(t for t, i in tokenizer.get_vocab().items() if i == shared[0])
        names = " and ".join(map(repr, tokens))
        raise InvalidArgumentError(f"{path} gives {names} the same id {shared[0]}")
    size = 1 + max(ids, default=-1)
    if vocab_size is not None and size > vocab_size:
        message = f"{path} has {size} tokens, but the model's vocabulary is {vocab_size}"
        raise InvalidArgumentError(message)
    return tokenizer


def tokenizer_id(path: str | Path) -> str:
    """Return a hash of the tokenizer file, as 64 hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class TokenTexts:
    """The texts of a tokenizer's tokens, alone or after other tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        # The ids of special tokens, by their texts.
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.special_ids = frozenset(self.special.values())
        kinds = _kinds(json.loads(tokenizer.decoder.__getstate__())) if tokenizer.decoder else []
        self.byte_level = kinds == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        self._byte_level_inside = "ByteLevel" in kinds and not self.byte_level
        self.raw = lru_cache(_CACHED)(self._raw)
        self.after = lru_cache(_CACHED)(self._after)
        self._anchor = self._find_anchor()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the library's text of ids, including special tokens."""
        return self.tokenizer.decode_batch([ids], skip_special_tokens=False)[0]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text that `TokenDecoder` returns for ids, including special tokens."""
        text = self.decode(ids)
        if not (self._byte_fallback and "\ufffd" in text):
            return text
        decoder = TokenDecoder(self)
        return "".join(map(decoder.push, ids)) + decoder.finish()

    def continuation(self, prompt: Sequence[int], ids: Iterable[int]) -> str:
        """Return the text that ids add to the text of a prompt, without special tokens."""
        decoder = TokenDecoder(self, prompt, skip_special_tokens=True)
        return "".join(map(decoder.push, ids)) + decoder.finish()

    def name(self, token_id: int, *, first: bool = False) -> tuple[str, bytes]:
        """Return a token's text and bytes.

        The text is the one that the token adds to other text, with its leading space. With
        `first`, it is the text at the beginning of a text. A part of a character has the text
        "bytes:\\xe4", as in OpenAI's API.
        """
        raw = self.raw(token_id)
        if raw is not None and "\ufffd" in raw.decode(errors="replace"):
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw
        text = self.decode([token_id]) if first else self.after((), (token_id,))
        return text, text.encode() if raw is None else raw

    def final(self, text: str) -> bool:
        """Return whether the next token cannot change this text of tokens."""
        return not (self._byte_level_inside and text.endswith("\ufffd"))

    def _raw(self, token_id: int) -> bytes | None:
        """Return the bytes of a token, or None if the decoder reads the token as text."""
        piece = self.tokenizer.id_to_token(token_id) or ""
        if self.byte_level:
            plain = set(piece) <= _BYTES.keys()
            return bytes(_BYTES[c] for c in piece) if plain else piece.encode()
        match = _BYTE_TOKEN.fullmatch(piece) if self._byte_fallback else None
        return bytes([int(match[1], 16)]) if match else None

    def _after(self, context: tuple[int, ...], ids: tuple[int, ...]) -> str:
        """Return the text that ids add to the text of the tokens in `context`."""
        before = [*self._anchor, *context]
        known, text = self.decode(before), self.decode([*before, *ids])
        while not text.startswith(known):  # the decoder strips the end of a text
            known = known[:-1]
        return text[len(known) :]

    def _find_anchor(self) -> tuple[int, ...]:
        """Return a token of letters. The library decodes tokens after it as within a text."""
        if self.byte_level:
            return ()
        ids = range(self.tokenizer.get_vocab_size())
        plain = (i for i in ids if i not in self.special_ids and self._raw(i) is None)
        found = next((i for i in plain if self.decode([i]).isalpha()), None)
        return () if found is None else (found,)


def _kinds(decoder: dict[str, Any]) -> list[str]:
    """Return the types of the decoders in a chain."""
    if "decoders" in decoder:
        return [kind for inner in decoder["decoders"] for kind in _kinds(inner)]
    return [decoder["type"]]


class TokenDecoder:
    """Decodes token ids that arrive one at a time. The returned parts of the text are final.

    The parts add up to the library's text of all ids, with one exception. In a run of byte tokens
    that is not UTF-8, the library decodes each byte to U+FFFD, and this class only invalid bytes.
    The time for a token does not depend on the number of tokens before it.
    """

    def __init__(
        self, texts: TokenTexts, prompt: Sequence[int] = (), *, skip_special_tokens: bool = False
    ) -> None:
        """`prompt` has the tokens before the text. Their own text is not returned."""
        self.texts = texts
        self.earlier = 0  # characters of the last part that belong to tokens before the last one
        self._skipped = texts.special_ids
        self._inside = False  # whether there is text before the text of the next token
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # for byte-level tokens
        self._unit: list[int] = []  # tokens whose text is not final
        self._bytes = b""  # the bytes of these tokens, if they are byte tokens
        self._context: tuple[int, ...] = ()  # the tokens before them, on which their text depends
        self._unfinished = ""  # U+FFFD for each byte of a character that the prompt begins
        for i in _tail(prompt, texts.special_ids):
            self.push(i)
        unfinished = self._utf8.getstate()[0][:1] or self._bytes
        self._unfinished = "\ufffd" * len(unfinished)
        self._skipped = texts.special_ids if skip_special_tokens else frozenset()

    @property
    def inside(self) -> bool:
        """Whether the next token follows text, if that makes a difference to the decoder."""
        return self._inside or self.texts.byte_level

    def push(self, token_id: int) -> str:
        """Return the text that a token completes. It may be empty."""
        self.earlier = 0
        if token_id in self._skipped:
            return ""
        raw = self.texts.raw(token_id)
        if raw is None:
            text = self._characters(last=True)
            self.earlier = len(text)
            self._unit.append(token_id)
            text += self._complete()
        elif self.texts.byte_level:
            unfinished = self._utf8.getstate()[0]
            text = self._utf8.decode(raw)
            self.earlier = int(bool(unfinished) and text.startswith("\ufffd"))
        else:
            text = "" if self._bytes else self._complete(last=True)
            self.earlier = len(text)
            self._unit.append(token_id)
            self._bytes += raw
            text += self._characters()
        return self._own(text)

    def finish(self) -> str:
        """Return the rest of the text. Bytes that did not become a character are U+FFFD."""
        rest = self._characters(last=True) + self._complete(last=True)
        return self._own(rest + self._utf8.decode(b"", final=True))

    def _own(self, text: str) -> str:
        """Remove U+FFFD for a character that the prompt began and that was not completed."""
        if text and self._unfinished:
            own = text.removeprefix(self._unfinished)
            self.earlier = max(0, self.earlier - (len(text) - len(own)))
            text, self._unfinished = own, ""
        return text

    def _characters(self, *, last: bool = False) -> str:
        """Return the text of complete characters in the byte tokens, or of all bytes if `last`."""
        text = ""
        while self._bytes:
            self.earlier = len(text)
            size = len(self._bytes)
            try:
                self._bytes.decode()
            except UnicodeDecodeError as error:
                if not last and error.reason == "unexpected end of data":
                    break
                size = 1
            # Decode apart from earlier tokens. The library would read all as one run of bytes.
            unit = tuple(self._unit[:size])
            text += self._emit(unit, self._text((), unit))
            self._unit, self._bytes = self._unit[size:], self._bytes[size:]
        return text

    def _complete(self, *, last: bool = False) -> str:
        """Return the text of the unit of text tokens, if it is final."""
        unit = tuple(self._unit)
        text = self._text(self._context, unit)
        if not (last or len(unit) >= _MAX_UNIT or self.texts.final(text)):
            return ""
        self._unit = []
        return self._emit(unit, text)

    def _text(self, context: tuple[int, ...], unit: tuple[int, ...]) -> str:
        """Return the text of the unit after its context, or at the beginning of the text."""
        if not unit:
            return ""
        if self._inside:
            return self.texts.after(context, unit)
        return self.texts.decode((*self._context, *unit))

    def _emit(self, unit: tuple[int, ...], text: str) -> str:
        """Return the given text, and make its unit the context of the next unit."""
        # A decoder may strip the beginning of a text, so tokens without text also count.
        self._context = unit if self._inside or text else (*self._context, *unit)
        self._inside |= bool(text) or len(self._context) >= _MAX_UNIT
        return text


def _tail(prompt: Sequence[int], special_ids: frozenset[int]) -> list[int]:
    """Return the last tokens of a prompt on which the text may depend, without special tokens."""
    own = (i for i in reversed(prompt) if i not in special_ids)
    return [*islice(own, _MAX_UNIT)][::-1]
