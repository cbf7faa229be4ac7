"""AdamW for machines without Transformer Engine or apex, in the layout of their FusedAdam.

megatron-core's reshardable optimizer checkpoints expect `step` in the parameter group and only the two moments in the
state; torch.optim.AdamW keeps `step` per parameter and cannot be loaded from such a checkpoint.
"""

from __future__ import annotations

import torch


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), moments in the parameters' dtype (fp32 here).

    `adam_w_mode` is accepted because megatron-core passes it to FusedAdam; only True is meant.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, **_):
        assert adam_w_mode, "only decoupled weight decay"
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            first, second = self._moments(parameters)
            beta1, beta2 = group["betas"]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            denominator = torch._foreach_sqrt(second)
            torch._foreach_div_(denominator, (1 - beta2 ** group["step"]) ** 0.5)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(parameters, first, denominator, -group["lr"] / (1 - beta1 ** group["step"]))

    def _moments(self, parameters: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return tuple([self.state[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq"))


def register_as_megatron_adam() -> None:
    """Make megatron-core build this optimizer where it would fall back to torch's AdamW."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distrib_optimizer.Adam = AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # "apex" stands for FusedAdam's layout here: step in the parameter group.
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
