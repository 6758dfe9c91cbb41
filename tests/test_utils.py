"""Seeds."""

import torch

import utils
from utils import generator_for


def test_generators_depend_on_their_key_and_on_nothing_else():
    keys = [(0,), (1,), (0, 1), (1, 0), (0, 0), (0, 0, 0), (0, 1, 0), (2**40, 3)]
    draws = {key: torch.rand(4, generator=generator_for(*key)).tolist() for key in keys}
    torch.manual_seed(7)
    for key in keys:
        assert draws[key] == torch.rand(4, generator=generator_for(*key)).tolist()
    assert len({tuple(draw) for draw in draws.values()}) == len(keys)


def test_default_generators_are_seeded_as_torch_does():
    utils.seed_default_generators(2**63 - 1, torch.device("cpu"))
    draw = torch.rand(4)
    torch.manual_seed(2**63 - 1)
    assert torch.equal(draw, torch.rand(4))
