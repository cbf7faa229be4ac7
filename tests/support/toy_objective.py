"""An objective that is not part of the engine, as a user would add it: this file, and one Task in config/task.py."""

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from gram_engine.config.task import Task
from gram_engine.objectives.base import PreferenceObjective, local_label_rows

TASK = Task("hinge", "tests.support.toy_objective:Hinge", text="judge", head="vocabulary")


class Hinge(PreferenceObjective):
    """max(0, 1 - margin towards the winner) of Z_A - Z_B at each label row."""

    def __call__(self, hidden_states, output_weight, context):
        rows = self.label_rows(hidden_states, context)
        held = local_label_rows(output_weight, self.label_ids, self.tp_group)
        row_a, row_b = reduce_from_tensor_model_parallel_region(held, group=self.tp_group)
        margins = rows.float() @ (row_a - row_b).float()
        losses = torch.relu(1 - margins * (2 * context.preference - 1))
        return self.output((losses * context.weight).sum(), margins, context)
