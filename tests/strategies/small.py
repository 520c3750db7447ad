"""What the tests of single strategies share."""

import torch

from peftlight import Adapter


def stirred(adapter: Adapter, amount: float = 0.05) -> Adapter:
    """Noise on all that is trained, so that every tensor changes the output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return adapter
