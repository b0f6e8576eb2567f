"""For all tests of the worker."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Test tensors are small: threads would cost more than they bring, and wait for each other on a busy machine."""
    torch.set_num_threads(1)
