"""Drawing a batch's next tokens on the device: worker/sampler.py's contract, in kernels. Logits and columns in, tokens out.

No sort and no read on the host; the grid follows from shapes, so that a CUDA graph can hold it all, and each row goes its own
way by its own parameters. A row of the vocabulary is divided among programs when rows are few. Four small kernels:

    best     argmax of each part of a row                                   (all that a greedy row needs)
    gather   mass of the softmax, and the tokens near the best one in a list  (rows with top-k or top-p)
    filter   the least score that top-k and top-p keep, by search             (the same rows)
    draw     argmax of score + Gumbel noise among what is kept, and the token  (two kernels: parts, then rows)

`adjust` comes before (bias, penalties, mask), `logprobs` beside it. Sums of mass are integers: in any order they are the same,
so a row's tokens depend on no other row and on no grid. What differs from the twin on the host: exp and log in float32, on
the device, may be wrong in their last digits (there the noise is computed in float64), which can change a draw only where two
sums of score and noise, or a filter's edge and a score, are equal to about six digits.

Legend: N rows, V vocabulary, P parts of a row.
"""
