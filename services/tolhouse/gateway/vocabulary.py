"""Text to token ids and back, of whole prompts and of single tokens."""

import asyncio
import functools
import itertools
import re

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tolhouse.errors import InvalidArgument, PromptTooLong

_SHORT = 4096  # characters that are tokenised in the event loop; more go to a thread
_LARGE = 2  # responses that grow with a text are made at a time: bounds their memory


class Vocabulary:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.large = tokenizer, asyncio.Semaphore(_LARGE)
        vocabulary = tokenizer.get_vocab()
        self.longest = max(map(len, vocabulary), default=1)  # characters or bytes of a token
        self.shown = functools.lru_cache(maxsize=len(vocabulary))(self._shown)

    async def ids(self, text: str, most: int | None = None, *, special: bool = False) -> list[int]:
        """Token ids of a text; PromptTooLong if its length alone says that they exceed `most`."""
        if most is not None and len(text) > most * self.longest:
            size = f"the prompt has {len(text)} characters"
            raise PromptTooLong(f"{size}, more than fit the context of {most} tokens: shorten it")
        if re.search("[\ud800-\udfff]", text):
            raise InvalidArgument("the prompt holds half a surrogate pair, which is no character")

        def encode() -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=special).ids

        return await asyncio.to_thread(encode) if len(text) > _SHORT else encode()

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def offsets(self, ids: list[int]) -> list[int]:
        """Where the text of each token begins in that of all."""
        stream = DecodeStream(skip_special_tokens=False)
        lengths = [len(stream.step(self.tokenizer, i) or "") for i in ids]
        return list(itertools.accumulate(lengths[:-1], initial=0)) if ids else []

    def _shown(self, token_id: int) -> tuple[str, list[int]]:
        """A token's text and bytes; a part of a character is "bytes:\\xe4", as OpenAI has it."""
        text = self.text([token_id])
        if "\ufffd" not in text:
            return text, list(text.encode())
        piece = self.tokenizer.id_to_token(token_id) or ""
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            raw = bytes([int(match[1], 16)])
        elif set(piece) <= _BYTES.keys():
            raw = bytes(_BYTES[c] for c in piece)
        else:
            return text, list(text.encode())
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


def check_ids(ids: list[int], vocab_size: int) -> list[int]:
    if bad := [i for i in ids if not 0 <= i < vocab_size]:
        allowed = f"allowed are 0 to {vocab_size - 1}"
        raise InvalidArgument(f"token id {bad[0]} is outside the vocabulary: {allowed}")
    return ids


def _byte_level() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


_BYTES = _byte_level()
