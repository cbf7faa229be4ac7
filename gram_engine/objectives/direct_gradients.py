"""Parameters whose gradient is written into main_grad by hand: megatron-core's DDP has to be told when it is complete."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter


def main_grad_of(weight: Tensor) -> Tensor | None:
    """The buffer that sums a weight's gradient, of the weight's shape; None for a frozen weight (training/freeze.py)."""
    return weight.main_grad if weight.requires_grad else None


class DirectGradients:
    """Fires DDP's backward hooks for parameters that autograd does not reach.

    With overlap_grad_reduce, DDP counts in every step the parameters of a bucket whose hooks have fired, and begins to reduce
    the bucket after the last one.  Autograd never fires the hook of a parameter that is not in its graph, so `_announce` does
    it once in each micro-batch's backward pass.
    """

    def __init__(self, chunk, parameters: list[Parameter]):
        """`chunk` is the model chunk that holds the parameters; without DDP around it there is nothing to do."""
        overlaps = getattr(getattr(chunk, "ddp_config", None), "overlap_grad_reduce", False)
        trained = [parameter for parameter in parameters if parameter.requires_grad] if overlaps else []
        self._groups = [(chunk.param_to_bucket_group[parameter], parameter) for parameter in trained]

    def announce_in_backward_of(self, loss: Tensor) -> None:
        """Fire the hooks when the backward pass begins, at the gradient of `loss`."""
        if self._groups and loss.requires_grad:
            loss.register_hook(self._announce)

    def _announce(self, _grad: Tensor) -> None:
        for group, parameter in self._groups:
            group.register_grad_ready(parameter)
