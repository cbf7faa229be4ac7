"""AdamW for machines without Transformer Engine and apex, with the state layout of their FusedAdam.

megatron-core's fully reshardable optimizer checkpoints expect `step` in the parameter group and only the two moments in the
state; torch.optim.AdamW has a `step` per parameter and cannot be loaded from such a checkpoint.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), computed by torch's fused kernel.

    The moments have the dtype of the parameters (fp32 main parameters here).  `adam_w_mode` is accepted because megatron-core
    passes it to FusedAdam; it must be True.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, **_):
        assert adam_w_mode, "only decoupled weight decay is supported"
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            first, second = self._moments(parameters)
            beta1, beta2 = group["betas"]
            # The kernel increments these steps before it uses them.
            before = torch.full((len(parameters),), group["step"] - 1.0, device=parameters[0].device).unbind()
            adamw(
                parameters,
                [parameter.grad for parameter in parameters],
                first,
                second,
                max_exp_avg_sqs=[],
                state_steps=list(before),
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _moments(self, parameters: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return tuple([self.state[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq"))


def register_as_megatron_adam() -> None:
    """Make megatron-core construct this optimizer instead of torch's AdamW, its fallback."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distrib_optimizer.Adam = AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # These flags select FusedAdam's layout, with `step` in the parameter group.
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
