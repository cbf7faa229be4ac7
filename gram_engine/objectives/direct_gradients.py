"""Parameters whose gradient is written into main_grad by hand: megatron-core's DDP has to be told when it is there."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter


class DirectGradients:
    """Stands in for the backward hooks of parameters that no backward pass reaches.

    Where gradients are reduced while the backward pass runs (overlap_grad_reduce), DDP counts the parameters of a bucket
    whose hooks have fired, in every step, and begins to reduce when all have.  Autograd never fires the hook of a
    parameter that it does not know of, so it is called for, once in each micro-batch's backward pass.
    """

    def __init__(self, chunk, parameters: list[Parameter]):
        """`chunk` is the DDP-wrapped model chunk that holds the parameters (or a bare model: then nothing is to be told)."""
        overlaps = getattr(getattr(chunk, "ddp_config", None), "overlap_grad_reduce", False)
        trained = [parameter for parameter in parameters if parameter.requires_grad and overlaps]
        self._groups = [(chunk.param_to_bucket_group[parameter], parameter) for parameter in trained]

    def announce_in_backward_of(self, loss: Tensor) -> None:
        """Have the parameters announced when the gradient of `loss` is computed."""
        if self._groups and loss.requires_grad:
            loss.register_hook(self._announce)

    def _announce(self, _grad: Tensor) -> None:
        for group, parameter in self._groups:
            group.register_grad_ready(parameter)
