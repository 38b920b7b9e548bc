"""What one would score on a task without looking at a user: the same ranking of its classes for all.

Legend: `N` test samples, `C` classes.
"""

import numpy as np

from userrep.data.tasks import PAD, ItemSequences, Task
from userrep.evaluation.ranking import METRIC_CUTOFFS, mrr_at_k


def popularity_score(task: Task, sequences: ItemSequences) -> float:
    """Score on test samples, by the task's metric and in [0, 1], of ranking classes by how often training has them.

    Training has a class where it is the label of a training sample; of a `next_item` task, where it is an item of a
    training row behind the first position, which are the targets of the loss. All classes are ranked, those without a
    count last; classes of one count are tied, see `ranking.py`.

    Args:
        task: whose training split is counted.
        sequences: that its rows are of.
    """
    train = task.samples("train")
    targets = task.labels[train]
    if task.kind == "next_item":
        items = sequences.items[task.rows[train], 1:]
        targets = items[items != PAD]
    counts_C = np.bincount(targets, minlength=task.num_classes)
    own_N = counts_C[task.labels[task.samples("test")]]
    # What `class_ranks` finds if each sample has the counts as its logits, without comparing N x C of them.
    ascending_C = np.sort(counts_C)
    below_N, up_to_N = (np.searchsorted(ascending_C, own_N, side) for side in ("left", "right"))
    return mrr_at_k(task.num_classes - up_to_N, up_to_N - below_N, METRIC_CUTOFFS[task.metric])
