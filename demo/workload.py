"""What the demo asks for: 24 beginnings of Python code, how many tokens each wants, and when it comes. Pure and seeded.

One request opens. When its first token is there, a crowd comes at once; the rest come one by one while the batch turns.
The opener is short: static batching serves whoever is first alone, and must not lose by that.
"""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass

MEAN_TOKENS, MAX_TOKENS = 64, 256  # output lengths: exponential, drawn again when above
OPENER_TOKENS = 24
CROWD = 15
PAUSE_TOKENS = 12  # between those that come after the crowd: the time that so many tokens take one request alone

PROMPTS = (
    "import os\n",
    "def fibonacci(n):\n",
    "class Stack:\n    def push(self, item):\n",
    'def read_lines(path):\n    """Return the lines of a text file, without their line ends."""\n',
    "for line in ",
    "def binary_search(values, wanted):\n    low, high = 0, len(values)\n    while low < high:\n"
    "        middle = (low + high) // 2\n",
    "class TestParser(unittest.TestCase):\n    def setUp(self):\n        self.parser = Parser()\n\n    def test_empty(self):\n",
    "try:\n    import json\nexcept ImportError:\n",
    "if __name__ == ",
    "def __init__(self, name, value=None):\n        self.name = name\n",
    'class Queue:\n    """A first in, first out queue.\n\n    If maxsize is not positive, the queue is infinite.\n    """\n\n'
    "    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n        self.items = []\n\n    def get(self):\n",
    "raise ValueError(",
    "def walk(top):\n    for root, dirs, files in os.walk(top):\n        for name in files:\n",
    "@property\n    def size(self):\n",
    "import sys\nimport re\nimport time\nimport socket\nimport logging\nimport threading\nfrom collections import deque\n",
    "with open(filename, 'rb') as file:\n    data = file.read()\n",
    "def main():\n    parser = argparse.ArgumentParser(description=__doc__)\n    parser.add_argument('files', nargs='*')\n"
    "    parser.add_argument('-v', '--verbose', action='store_true')\n    args = parser.parse_args()\n",
    "return [x for x in ",
    "async def fetch(reader, writer):\n    while True:\n        data = await reader.read(1024)\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def __repr__(self):\n",
    "def quote(s):\n",
    "# Copyright (C) ",
    'def parse_header(line):\n    """Parse a Content-type like header.\n\n    Return the main content-type and a dictionary.\n'
    '    """\n    parts = line.split(";")\n    key = parts[0].strip()\n    options = {}\n    for part in parts[1:]:\n',
    "while True:\n    try:\n        item = queue.get(timeout=1)\n    except Empty:\n",
)


@dataclass(frozen=True)
class Work:
    """One request of the demo."""

    label: str  # a capital letter, the request's name in every picture
    prompt: str
    max_tokens: int  # it gets exactly so many: greedy, end tokens ignored, so that both policies do the same work
    after_crowd: int  # when it comes: so many pauses after the crowd; the opener comes before


def workload(seed: int = 0) -> list[Work]:
    """All requests, the opener first, in the order in which they come."""
    draws = random.Random(seed)
    works = []
    for index, prompt in enumerate(PROMPTS):
        tokens = OPENER_TOKENS if index == 0 else _length(draws)
        works.append(Work(string.ascii_uppercase[index], prompt, tokens, max(0, index - CROWD)))
    return works


def _length(draws: random.Random) -> int:
    while (tokens := math.ceil(draws.expovariate(1 / MEAN_TOKENS))) > MAX_TOKENS:
        pass
    return tokens
