"""Standard Gumbel noise from Philox-4x32-10 (Salmon et al., SC 2011), as worker/philox.py defines it: key = seed, counter =
(token // 4, position, output index, 0), word token % 4; u = ((x >> 9) + 1/2) · 2⁻²³, noise = −log(−log u), in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel_noise(begin, seed, position, output_index, BLOCK: tl.constexpr):
    """Of the tokens begin … begin + BLOCK − 1; begin is a multiple of four. seed: the bits of 64, position: those of 32."""
    group = (begin // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = group ^ group
    w0, w1, w2, w3 = tl.philox(seed, group, zero + position.to(tl.uint32), zero + output_index.to(tl.uint32), zero)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    u = ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))
