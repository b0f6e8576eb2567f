"""What a step costs, learned from the steps that were: a table over the number of tokens, plus what attention adds.

Knows no request and no clock; durations are what the worker measured. A step that computes n tokens is taken to last

    base(n) + decode_ns * D + chunk_ns * C        D, C: pairs (computed token, token it attends to) of decodes and of chunks

base: straight lines between the means of buckets of n (1, 2, 3, 4, 6, 8, 12, 16, 24, …), never falling. The two rates come
from how durations vary with D and C inside buckets (least squares, pooled over buckets): a decode reads the whole context for
one token, a chunk reads it once for many, so a pair of the one may cost 30 times a pair of the other.

Floats are used with a fixed order of additions, multiplications and divisions only, so that the same steps give the same
numbers on every machine (law 1). Observing and predicting together take about 4 µs.
"""

from __future__ import annotations

from bisect import bisect_left

_MEMORY = 8  # a bucket's means follow with 1/8 of each step
_SLOW = (
    1.5  # a step that took longer than so many times what was expected counts as that: a hiccup moves a mean by 1/16 at most
)
_FAST = 0.5  # one that took less than half shows that the mean was wrong: half way at once
_STALE = (
    256  # steps; what costs more than in proportion to the next smaller size and was not seen for so long is doubted: a size
)
# that noise made look dear would never be tried again
_LEVEL_EVERY = 8  # steps between two levellings of the whole table
_RATES_MEANS = 64  # steps that the means for the rates remember: longer than _MEMORY, whose errors steer the next chunks' sizes
_RATES_FAR = 0.3  # a step further than this from what was expected is no news of attention
_RATES_MEMORY = 2048  # steps that the rates of attention remember
_RATES_EVERY = 32  # steps between two looks at them; a multiple of _LEVEL_EVERY
_RATES_LEAST = 1e-4  # (1 %)²: a context that varies by less inside its bucket tells nothing
_RATES_SHARE = 0.9  # of a bucket's mean duration; attention is never taken to be more
_GROWTH = 2  # a chunk makes no step larger than twice the largest that was seen


class _Bucket:
    """Steps of about the same number of tokens: their means. Times in nanoseconds."""

    __slots__ = ("chunk_pairs", "count", "decode_pairs", "duration", "last_step", "slope", "slow", "tokens")

    def __init__(self, tokens: float, decode_pairs: float, chunk_pairs: float, duration: float) -> None:
        self.count = 1
        self.tokens = tokens
        self.decode_pairs = decode_pairs
        self.chunk_pairs = chunk_pairs
        self.duration = duration
        self.last_step = 0  # in which it was seen
        self.slope = 0.0  # of the base there, a token
        self.slow = (tokens, decode_pairs, chunk_pairs, duration)  # means over more steps


class StepCost:
    """Times in nanoseconds."""

    def __init__(self) -> None:
        self._numbers: list[int] = []  # of the buckets seen, rising
        self._buckets: list[_Bucket] = []  # [i]
        self._tokens: list[float] = []  # [i] mean
        self._base: list[float] = []  # [i] mean duration without attention, made not to fall
        self._decode_ns = 0.0  # of one pair
        self._chunk_ns = 0.0
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of the rates' least squares: DD, DC, CC, Dy, Cy
        self._steps = 0

    @property
    def is_known(self) -> bool:
        return bool(self._base)

    def observe(
        self, num_tokens: int, num_rows: int, context_tokens: int, duration_ns: int, decode_context: int | None = None
    ) -> None:
        """A step computed num_tokens of num_rows rows. context_tokens: pairs (computed token, token that it attends to), of
        which decode_context belong to rows with one token (None: all in a step of decodes alone, else none)."""
        if num_tokens <= 0 or duration_ns <= 0:
            return
        if decode_context is None:
            decode_context = context_tokens if num_tokens == num_rows else 0
        chunk_context, duration = context_tokens - decode_context, float(duration_ns)
        number = _number(num_tokens)
        i = bisect_left(self._numbers, number)
        if i == len(self._numbers) or self._numbers[i] != number:
            self._insert(i, number, _Bucket(float(num_tokens), float(decode_context), float(chunk_context), duration))
            return
        bucket = self._buckets[i]
        bucket.count = count = bucket.count + 1
        mean = bucket.duration
        off_tokens = num_tokens - bucket.tokens
        off_decode, off_chunk = decode_context - bucket.decode_pairs, chunk_context - bucket.chunk_pairs
        by_tokens = off_tokens * bucket.slope
        expected = mean + by_tokens + self._decode_ns * off_decode + self._chunk_ns * off_chunk
        rate = 1.0 / count if count < _MEMORY else 1.0 / _MEMORY
        if duration > _SLOW * expected > 0.0:
            duration = _SLOW * expected
        elif duration < _FAST * expected:
            rate = 0.5
        else:
            self._learn_rates(bucket, num_tokens, decode_context, chunk_context, duration)
        bucket.tokens = self._tokens[i] = bucket.tokens + rate * off_tokens
        bucket.decode_pairs += rate * off_decode
        bucket.chunk_pairs += rate * off_chunk
        bucket.duration = mean + rate * (duration - mean)
        self._steps = bucket.last_step = self._steps + 1
        if self._steps % _LEVEL_EVERY:
            base = self._own_base(bucket)
            if i and base < self._base[i - 1]:
                base = self._base[i - 1]
            elif i + 1 < len(self._base) and base > self._base[i + 1]:
                base = self._base[i + 1]
            self._base[i] = base
        else:
            if not self._steps % _RATES_EVERY:
                self._update_rates()
            self._level()

    def predict(self, num_tokens: int, num_rows: int, context_tokens: int, decode_context: int | None = None) -> int:
        """Of such a step; 0 when nothing is known yet. Past the largest step seen by the slope up to there."""
        if not self._base:
            return 0
        if decode_context is None:
            decode_context = context_tokens if num_tokens == num_rows else 0
        chunk_context = context_tokens - decode_context
        return int(self._base_of(num_tokens) + self._decode_ns * decode_context + self._chunk_ns * chunk_context)

    def tokens_within(self, target_ns: int, num_decodes: int, decode_context: int, chunk_context: int, most: int) -> int:
        """The largest chunk, at most `most` tokens, with which a step of so many decodes keeps to the target; 0 if not even the
        decodes do. chunk_context: tokens that stand before the chunk. `most` when nothing is known yet; and no step more than
        twice as large as the largest seen, so that a new size is tried with care."""
        if not self._base:
            return most
        left = target_ns - self._decode_ns * decode_context
        most = min(most, int(_GROWTH * self._tokens[-1]) + 1 - num_decodes)
        if most <= 0:
            return 0

        def fits(chunk: int) -> bool:
            return self._base_of(num_decodes + chunk) + self._chunk_ns * _pairs(chunk_context, chunk) <= left

        if fits(most):
            return most
        low, high = 0, most  # fits (or nothing does), does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def prefill_ns(self, num_tokens: int, step_tokens: int = 512, pairs: int | None = None) -> int:
        """To compute a prompt of so many tokens with nothing else, in steps of at most step_tokens. pairs: of a token and one
        that it attends to, where it is not a single prompt from its start."""
        if not self._base or num_tokens <= 0:
            return 0
        steps, rest = divmod(num_tokens, step_tokens)
        base = steps * self._base_of(step_tokens) + (self._base_of(rest) if rest else 0.0)
        return int(base + self._chunk_ns * (_pairs(0, num_tokens) if pairs is None else pairs))

    def recompute_ns(self, num_tokens: int, step_tokens: int = 512) -> int:
        """What computing so many tokens again adds to steps that others take anyway: without what every step costs."""
        if not self._base or num_tokens <= 0:
            return 0
        num_steps = -(-num_tokens // step_tokens)
        return max(0, self.prefill_ns(num_tokens, step_tokens) - int(num_steps * self._base_of(1)))

    # ----------------------------------------------------------------------------------------------------- inside

    def _base_of(self, num_tokens: int) -> float:
        sizes, base = self._tokens, self._base
        i = bisect_left(sizes, num_tokens)
        if i == 0:  # smaller than any seen: half of it is what every step costs, half goes by tokens
            return base[0] * (0.5 + 0.5 * num_tokens / sizes[0])
        if i == len(sizes):
            return base[-1] + (num_tokens - sizes[-1]) * self._last_slope()
        left, right = sizes[i - 1], sizes[i]
        return base[i - 1] + (base[i] - base[i - 1]) * (num_tokens - left) / (right - left)

    def _last_slope(self) -> float:
        """Past the largest size: over its upper half, against noise. In proportion when there is only one size."""
        last = len(self._base) - 1
        i = last
        while i > 0 and 2 * self._tokens[i] > self._tokens[last]:
            i -= 1
        if i == last:
            return self._base[last] / self._tokens[last]
        return (self._base[last] - self._base[i]) / (self._tokens[last] - self._tokens[i])

    def _own_base(self, bucket: _Bucket) -> float:
        attention = self._decode_ns * bucket.decode_pairs + self._chunk_ns * bucket.chunk_pairs
        return bucket.duration - attention if bucket.duration > attention else 0.0

    def _level(self) -> None:
        """Never falling: half way between the largest up to there and the smallest from there. Then the slopes anew."""
        up = [self._own_base(bucket) for bucket in self._buckets]
        for i in range(1, len(up)):
            if self._steps - self._buckets[i].last_step > _STALE:
                above = up[i] - up[i - 1] * self._tokens[i] / self._tokens[i - 1]
                if above > 0.0:
                    self._buckets[i].duration -= above / _MEMORY
        down = up.copy()
        for i in range(1, len(up)):
            if up[i] < up[i - 1]:
                up[i] = up[i - 1]
        for i in range(len(down) - 2, -1, -1):
            if down[i] > down[i + 1]:
                down[i] = down[i + 1]
        base = self._base = [(most + least) / 2 for most, least in zip(up, down, strict=True)]
        tokens, last = self._tokens, len(base) - 1
        for i, bucket in enumerate(self._buckets):
            low, high = (i - 1 if i else 0), (i + 1 if i < last else last)
            while low and 2 * tokens[high] < 3 * tokens[low]:
                low -= 1
            if 2 * tokens[high] < 3 * tokens[low]:  # too close for a slope
                bucket.slope = 0.5 * base[i] / tokens[i]
            else:
                bucket.slope = (base[high] - base[low]) / (tokens[high] - tokens[low])

    def _insert(self, i: int, number: int, bucket: _Bucket) -> None:
        """First step of its bucket. If it took over twice what larger ones take, it counts as twice."""
        if i < len(self._base):
            attention = self._decode_ns * bucket.decode_pairs + self._chunk_ns * bucket.chunk_pairs
            bucket.duration = min(bucket.duration, _SLOW * (self._base[i] + attention))
        bucket.last_step = self._steps
        self._numbers.insert(i, number)
        self._buckets.insert(i, bucket)
        self._tokens.insert(i, bucket.tokens)
        self._level()

    def _learn_rates(self, bucket: _Bucket, tokens: int, decode_pairs: int, chunk_pairs: int, duration: float) -> None:
        """From a step's deviations from its bucket's means, relative to the mean duration."""
        mean_tokens, mean_d, mean_c, mean = bucket.slow
        off_tokens, off_d, off_c, off = tokens - mean_tokens, decode_pairs - mean_d, chunk_pairs - mean_c, duration - mean
        rate = 1.0 / bucket.count if bucket.count < _RATES_MEANS else 1.0 / _RATES_MEANS
        bucket.slow = (mean_tokens + rate * off_tokens, mean_d + rate * off_d, mean_c + rate * off_c, mean + rate * off)
        weight = 1.0 / mean
        d, c, y = off_d * weight, off_c * weight, (off - off_tokens * bucket.slope) * weight
        if not -_RATES_FAR < y < _RATES_FAR:
            return
        mean_d, mean_c = mean_d * weight, mean_c * weight
        keep = 1.0 - 1.0 / _RATES_MEMORY
        dd, dc, cc, dy, cy = self._sums
        self._sums = (
            keep * dd + d * d + _RATES_LEAST * mean_d * mean_d,
            keep * dc + d * c,
            keep * cc + c * c + _RATES_LEAST * mean_c * mean_c,
            keep * dy + d * y,
            keep * cy + c * y,
        )

    def _update_rates(self) -> None:
        dd, dc, cc, dy, cy = self._sums
        both = dd * cc - dc * dc
        decode = (dy * cc - cy * dc) / both if both > 0.0 else -1.0
        chunk = (cy * dd - dy * dc) / both if both > 0.0 else -1.0
        if decode < 0.0 or chunk < 0.0:  # the one of them that explains more
            decode = max(0.0, dy / dd) if dd > 0.0 else 0.0
            chunk = max(0.0, cy / cc) if cc > 0.0 else 0.0
            decode, chunk = (decode, 0.0) if decode * dy > chunk * cy else (0.0, chunk)
        share = 0.0  # the largest that attention would have of a bucket's duration
        for bucket in self._buckets:
            share = max(share, (decode * bucket.decode_pairs + chunk * bucket.chunk_pairs) / bucket.duration)
        if share > _RATES_SHARE:
            decode, chunk = decode * _RATES_SHARE / share, chunk * _RATES_SHARE / share
        self._decode_ns, self._chunk_ns = decode, chunk


def _number(num_tokens: int) -> int:
    """Number of the bucket [1], [2], [3], [4, 5], [6, 7], [8, 11], [12, 15], [16, 23], …"""
    bits = num_tokens.bit_length()
    return 2 * bits + (num_tokens >> (bits - 2) & 1) if bits > 1 else 0


def _pairs(before: int, num_tokens: int) -> int:
    """Pairs of a chunk of so many tokens behind `before` others; each attends to itself too."""
    return num_tokens * before + num_tokens * (num_tokens + 1) // 2
