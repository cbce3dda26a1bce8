"""Every test starts from the same random state, on one core; hypothesis never times anything."""

import re

import covering
import pytest
import torch
from hypothesis import settings

settings.register_profile("axioms", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("axioms")
torch.set_num_threads(1)


def pytest_configure(config):
    # To collect twenty thousand rows only to leave them out would take each worker fifteen seconds.
    covering.full = re.search(r"(?<!not )\bfull\b", config.option.markexpr) is not None


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
