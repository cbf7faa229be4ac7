"""LoRA on transformers' LlamaForCausalLM written out by hand: what the engine's adapters are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PROJECTIONS = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}


class LoraLinear(torch.nn.Module):
    """y = W x + scale * B A x with frozen W; `a` may be shared with other projections."""

    def __init__(self, base: torch.nn.Linear, a: torch.nn.Parameter, scale: float):
        super().__init__()
        self.base, self.a, self.scale = base, a, scale
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, len(a)))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.scale * (hidden @ self.a.T @ self.b.T)

    def merged(self) -> Tensor:
        return self.base.weight + self.scale * self.b @ self.a


def add_adapters(model, first_a: dict[tuple[int, str], Tensor], scale: float) -> None:
    """Freeze `model` and put adapters into every layer; `first_a` is A by (layer, one of PROJECTIONS)."""
    model.requires_grad_(False)
    for (layer, module), values in first_a.items():
        a = torch.nn.Parameter(values.clone())
        for path in PROJECTIONS[module]:
            parent_name, _, name = path.partition(".")
            parent = getattr(model.model.layers[layer], parent_name)
            setattr(parent, name, LoraLinear(getattr(parent, name), a, scale))


def train(model, batches: list[list], loss_of, lr: float) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of AdamW with gradients clipped to 1; a batch is a list of packs."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    curve = []
    for packs in batches:
        optimizer.zero_grad()
        total, count = 0.0, sum(len(pack.rows) for pack in packs)
        for pack in packs:
            loss = loss_of(row_logits(model, pack), pack) / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        curve.append((total, norm.item()))
    return curve


def row_logits(model, pack) -> Tensor:
    """Logits [rows, vocabulary] at a pack's rows, each sequence alone."""
    bounds = pack.cu_seqlens.tolist()
    logits = [model(pack.tokens[None, first:end]).logits[0] for first, end in zip(bounds, bounds[1:])]
    return torch.cat(logits)[pack.rows]


def response_loss(logits: Tensor, pack) -> Tensor:
    """Eq. 4, summed."""
    return F.cross_entropy(logits, pack.targets, reduction="sum")


def pair_loss(label_ids: tuple[int, int], label_smoothing: float):
    """Eq. 6-8, summed: softmax over the two labels."""

    def loss(logits: Tensor, pack) -> Tensor:
        first = label_smoothing + (1 - 2 * label_smoothing) * pack.preference
        log_p = F.log_softmax(logits[:, list(label_ids)], dim=1)
        return -(first * log_p[:, 0] + (1 - first) * log_p[:, 1]).sum()

    return loss
