"""What each objective needs of the data, the model and the cost model. The losses are classes in gram_engine/objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Task:
    """What data, model and planner need to know of one objective."""

    name: str
    """Value of --objective, also stored with preprocessed data and checkpoints."""
    loss: str
    """Class of the loss (a subclass of objectives.base.Objective) as "module:class"; build_objective imports it."""
    text: Literal["generate", "judge", "conversations"]
    """The text of a sample, and the positions that carry loss (data/samples.py).

    generate: the prompt, then both responses; loss at every token of the responses.
    judge: the judge prompt with both responses; loss at its last token, the label row.
    conversations: two sequences, the prompt with each response; loss at the last token of each.
    """
    head: Literal["vocabulary", "labels", "scalar"]
    """Output layer: the whole vocabulary, the rows of the two label tokens alone (if the flags allow it), or one number."""

    @property
    def needs_labels(self) -> bool:
        """Whether a pair must say which response is better."""
        return self.text != "generate"

    @property
    def has_label_tokens(self) -> bool:
        """Whether the loss is that of the template's two label tokens, A and B."""
        return self.text == "judge"

    @property
    def order_matters(self) -> bool:
        """Whether the sample differs with the order in which the two responses are shown."""
        return self.text != "conversations"

    @property
    def sequences_per_sample(self) -> int:
        """Sequences of one sample that do not attend to each other, each of at most --seq-length tokens."""
        return 2 if self.text == "conversations" else 1


TASKS = {
    task.name: task
    for task in (
        Task("response-lm", "gram_engine.objectives.response_lm:ResponseLM", "generate", "vocabulary"),
        Task("pair-preference", "gram_engine.objectives.pair_preference:PairPreference", "judge", "labels"),
        Task("bradley-terry", "gram_engine.objectives.bradley_terry:BradleyTerry", "conversations", "scalar"),
    )
}

ObjectiveName = Literal[tuple(TASKS)]  # the choices of --objective
