"""Which trained tensors a loss depends on, known before its backward pass."""

from collections.abc import Mapping

from torch import Tensor, nn

from peftlight.shards import unsharded


def unreached(loss: Tensor, model: nn.Module, named: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of those parameters of the model that would get no gradient from the loss."""
    leaves, computes = _leaves(loss), unsharded(model)
    return [name for name, parameter in named.items() if computes.get(parameter, parameter) not in leaves]


def _leaves(loss: Tensor) -> set[Tensor]:
    """The tensors at which the loss's graph ends."""
    seen, waiting, leaves = set(), [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        waiting.extend(before for before, _ in node.next_functions)
    return leaves
