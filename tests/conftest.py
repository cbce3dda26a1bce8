"""Every test starts from the same random state, on one core; hypothesis never times anything."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("axioms", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("axioms")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
