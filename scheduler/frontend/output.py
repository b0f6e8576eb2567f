"""One output on its way to the reader: tokens go in one by one, what is certain comes out in pieces. Pure, no waiting.

With stop strings, text that may be the beginning of one is held back, and a token goes out with the first of its text (a token
without text, with the text after it). So when a stop string is found, the text ends exactly there, and token_ids end with the
last token of which some text was kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.frontend.detokenizer import Detokenizer
from scheduler.frontend.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain since the last one. Offsets: of the first token, and of the first UTF-8 byte of the text."""

    token_offset: int
    text_offset: int
    tokens: list[int]
    text: str


class Output:
    """Without stop strings: every token is certain at once. Its text is made when somebody asks, of all new tokens together."""

    def __init__(self, detokenizer: Detokenizer | None) -> None:
        self.num_tokens = 0  # that came in
        self.stop_string = ""  # found in the text; the output has ended then
        self._detokenizer = detokenizer  # None: nobody wants text
        self._tokens: list[int] = []
        self._num_decoded = 0  # of these
        self._text: list[str] = []
        self._token_offset = 0
        self._text_offset = 0

    def push(self, token: int) -> None:
        """The next token."""
        self.num_tokens += 1
        self._tokens.append(token)

    def finish(self) -> None:
        """No token follows: what was waiting is certain now."""
        if self._detokenizer is not None:
            self._decode()
            self._text.append(self._detokenizer.flush())

    def _decode(self) -> None:
        """The tokens that came since the last time."""
        if self._detokenizer is not None and self._num_decoded < len(self._tokens):
            self._text.append(self._detokenizer.decode(self._tokens[self._num_decoded :]))
        self._num_decoded = len(self._tokens)

    @property
    def certain(self) -> tuple[int, bytes]:
        """Tokens, and the text in UTF-8, that are certain and were not taken."""
        self._decode()
        return len(self._tokens), "".join(self._text).encode()

    def skip(self, num_tokens: int, num_bytes: int) -> None:
        """So many tokens and bytes of what is certain: their reader has them already. The bytes end between two characters."""
        _, text = self.certain
        self._tokens, self._text = self._tokens[num_tokens:], [text[num_bytes:].decode()]
        self._num_decoded = len(self._tokens)
        self._token_offset += num_tokens
        self._text_offset += num_bytes

    def take(self) -> Piece | None:
        """All that is certain and was not taken before; None if there is nothing."""
        self._decode()
        text = "".join(self._text)
        if not self._tokens and not text:
            return None
        piece = Piece(self._token_offset, self._text_offset, self._tokens, text)
        self._token_offset += len(self._tokens)
        self._text_offset += len(text) if text.isascii() else len(text.encode())
        self._tokens, self._text, self._num_decoded = [], [], 0
        return piece


@dataclass(slots=True)
class _Held:
    """A token whose text, or the rest of it, is not certain yet."""

    token: int | None  # None: it went out with the first of its text
    text: str


class StoppableOutput(Output):
    """With stop strings."""

    def __init__(self, detokenizer: Detokenizer, stop_strings: StopStrings, include_stop: bool) -> None:
        super().__init__(None)  # text is made here, token by token
        self._detok = detokenizer
        self._stop_strings = stop_strings
        self._include_stop = include_stop
        self._held: list[_Held] = []
        self._num_held = 0  # characters in it

    def push(self, token: int) -> None:
        """The next token; does nothing once a stop string was found."""
        if self.stop_string:
            return
        self.num_tokens += 1
        late, own = self._detok.step(token)
        if late:
            self._late_text(late)
        if not self.stop_string:
            self._held.append(_Held(token, own))
            self._search(own)

    def finish(self) -> None:
        """No token follows. What was waiting may hold a stop string, too."""
        if self.stop_string:
            return
        late = self._detok.flush()
        if late:
            self._late_text(late)
        if not self.stop_string:
            self._release(self._num_held)
            self._tokens += [held.token for held in self._held if held.token is not None]
            self._held.clear()

    def _late_text(self, text: str) -> None:
        """Text of the tokens before the newest."""
        if self._held:
            self._held[-1].text += text
        else:
            self._held.append(_Held(None, text))
        self._search(text)

    def _search(self, text: str) -> None:
        """`text` was added to the end of what is held."""
        self._num_held += len(text)
        found = self._stop_strings.feed(text)
        if found is None:
            self._release(self._num_held - self._stop_strings.num_held)
            return
        self.stop_string, end = found
        after = len(text) - end
        self._release(self._num_held - after - (0 if self._include_stop else len(self.stop_string)))
        self._held.clear()

    def _release(self, num_characters: int) -> None:
        """So many of the held characters are certain, and the tokens that they begin in, and those before."""
        self._num_held -= num_characters
        done = 0
        while num_characters:
            held = self._held[done]
            if held.token is not None:
                self._tokens.append(held.token)
                held.token = None
            self._text.append(held.text[:num_characters])
            taken = len(self._text[-1])
            num_characters -= taken
            held.text = held.text[taken:]
            done += not held.text
        del self._held[:done]
