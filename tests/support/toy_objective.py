"""An objective that the engine does not ship, as a stranger would add it: this file, and one Task in config/task.py."""

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from gram_engine.config.task import Task
from gram_engine.objectives.base import PreferenceObjective, gather_rows, local_label_rows

TASK = Task("hinge", "tests.support.toy_objective:Hinge", text="judge", head="vocabulary")


class Hinge(PreferenceObjective):
    """max(0, 1 - margin towards the winner) of Z_A - Z_B at each label row."""

    def __init__(self, label_ids, tp_group, pruned: bool, sequence_parallel: bool):
        self.label_ids, self.tp_group = label_ids, tp_group
        self.pruned, self.sequence_parallel = pruned, sequence_parallel

    @classmethod
    def build(cls, config, label_ids, tp_group):
        return cls(label_ids, tp_group, config.prunes_last_layer, config.parallel.sequence_parallel)

    def __call__(self, hidden_states, output_weight, context):
        if self.pruned:
            rows = hidden_states.squeeze(1)
        else:
            rows = gather_rows(hidden_states, context.rows, self.tp_group, self.sequence_parallel)
        held = local_label_rows(output_weight, self.label_ids, self.tp_group)
        row_a, row_b = reduce_from_tensor_model_parallel_region(held, group=self.tp_group)
        margins = rows.float() @ (row_a - row_b).float()
        losses = torch.relu(1 - margins * (2 * context.preference - 1))
        return self.output((losses * context.weight).sum(), margins, context)
