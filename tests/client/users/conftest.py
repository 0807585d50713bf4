import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small models lose more to threads that wait for each other than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
