"""From token ids to text while they arrive: no broken UTF-8, and nothing of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one completion, in pieces that are final. `stopped` once a stop string was met; its text is left out."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.ids: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=True)
        self._decoded = 0  # characters the stream has given
        self._held = ""  # characters that might be the beginning of a stop string

    def push(self, ids: Sequence[int]) -> str:
        """Take in tokens; the text they complete, which may be empty."""
        text = ""
        for i in ids:
            self.ids.append(i)
            text += self._stream.step(self.tokenizer, i) or ""
        self._decoded += len(text)
        return self._release(text, last=False)

    def finish(self) -> str:
        """The rest of the text, once there are no more tokens: bytes that never became a character show as U+FFFD."""
        return "" if self.stopped else self._release(self.tokenizer.decode(self.ids)[self._decoded :], last=True)

    def _release(self, text: str, last: bool) -> str:
        text = self._held + text
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = 0 if last else max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]
