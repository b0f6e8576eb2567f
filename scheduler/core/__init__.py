"""The thinking: which sequence computes how many tokens in the next step, on which blocks.

A deterministic function of its inputs. No socket, no clock, no randomness, no thread, no torch: time is an argument in
integer nanoseconds, decisions use integers, and nothing depends on the order of a set or on the hash seed.
"""

from scheduler.core.config import CoreConfig
from scheduler.core.core import Core, Output

__all__ = ["Core", "CoreConfig", "Output"]
