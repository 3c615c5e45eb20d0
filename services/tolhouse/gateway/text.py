"""From token ids to text while they arrive: no broken UTF-8, and nothing of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one completion, in pieces that are final. `stopped` once a stop string was met.

    The stop string that is complete first ends the text, before it or, with `include_stop`, after it: that does not depend
    on how tokens arrive.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, include_stop: bool = False
    ) -> None:
        self.tokenizer, self.stop, self.include_stop, self.stopped = (
            tokenizer,
            stop,
            include_stop,
            False,
        )
        self.ids: list[int] = []
        self.offsets: list[int] = []  # where the text of each token begins
        self.released = 0  # characters given away
        self._stream = DecodeStream(skip_special_tokens=True)
        self._decoded = 0  # characters the stream has given
        self._held = ""  # characters that might be the beginning of a stop string

    def push(self, ids: Sequence[int]) -> str:
        """Take in tokens; the text they complete, which may be empty."""
        text = ""
        for i in ids:
            self.ids.append(i)
            self.offsets.append(self._decoded + len(text))
            text += self._stream.step(self.tokenizer, i) or ""
        self._decoded += len(text)
        return self._release(text, last=False)

    def finish(self) -> str:
        """The rest of the text, once there are no more tokens: bytes that never became a character show as U+FFFD."""
        return (
            ""
            if self.stopped
            else self._release(self.tokenizer.decode(self.ids)[self._decoded :], last=True)
        )

    def _release(self, text: str, last: bool) -> str:
        text = self._held + text
        found = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            end, begin = min(found)
            given = end if self.include_stop else begin
            self._held = ""
        else:
            longest = (
                0
                if last
                else max(
                    (n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])),
                    default=0,
                )
            )
            given = len(text) - longest
            self._held = text[given:]
        self.released += given
        return text[:given]
