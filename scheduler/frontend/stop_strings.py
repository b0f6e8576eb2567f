"""Finding stop strings in text that comes in pieces. Pure: knows characters, no tokens.

Aho and Corasick, "Efficient string matching: an aid to bibliographic search", CACM 18 (1975): one state for all strings, one
look-up per character, and the state's depth is how much of the text's end may still become a stop string.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Finds the match that ends first; of those that end at the same character, the longest. However the text is cut up."""

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "none is empty"
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._longest = [""]  # the longest stop string that ends in this state
        self._fallback = [0]
        for string in strings:
            self._insert(string)
        self._link()
        self._state = 0

    def another(self) -> StopStrings:
        """For another text, from its beginning; shares the tables."""
        twin = copy.copy(self)
        twin._state = 0
        return twin

    def feed(self, text: str) -> tuple[str, int] | None:
        """More text. (the stop string found, how many of these characters it took to find it), or None."""
        state = self._state
        for i, character in enumerate(text):
            while state and character not in self._next[state]:
                state = self._fallback[state]
            state = self._next[state].get(character, 0)
            if self._longest[state]:
                return self._longest[state], i + 1
        self._state = state
        return None

    @property
    def num_held(self) -> int:
        """How many characters at the end of the text so far may be the beginning of a stop string."""
        return self._depth[self._state]

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._longest.append("")
                self._fallback.append(0)
            state = self._next[state][character]
        self._longest[state] = string

    def _link(self) -> None:
        """Breadth first: where to go on when a character does not fit, the longest shorter beginning."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, child in self._next[state].items():
                waiting.append(child)
                fallback = self._fallback[state]
                while fallback and character not in self._next[fallback]:
                    fallback = self._fallback[fallback]
                self._fallback[child] = self._next[fallback].get(character, 0)
                self._longest[child] = self._longest[child] or self._longest[self._fallback[child]]
