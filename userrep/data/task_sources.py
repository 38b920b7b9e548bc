"""Task sets of data sets with events, items and profiles: MovieLens with its ratings, and the synthetic world.

Both are built straight from a source's tables, in memory. Nothing is left out without a count in `TaskSet.facts`.

Legend: `U` users with a sequence, `E` events, `N` samples of a task.
"""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions at import, unseen by type checkers.

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from userrep.config import ConfigError
from userrep.data.sources.source import Source
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.sources.world import build_world
from userrep.data.task_builder import TaskBuilder, read_log
from userrep.data.tasks import TaskSet, TaskSplit

MOVIELENS_LABELS = ("gender", "age", "occupation")
SYNTHETIC_LABELS = ("gender", "age_band")


def ml1m_tasks(
    source: Source, split: TaskSplit | None = None, max_items: int = 30, max_targets: int | None = None
) -> TaskSet:
    """Six tasks of MovieLens 1M.

    T1 next item of a user's most recent ratings below 4; T2 a movie that the user rated 4, T3 one rated 5, one sample
    per user and movie, whether rated before or after those of the sequence; T4 gender, T5 age band, T6 occupation.
    Classes of T2 and T3 are the movies that are a target of the task in any split, in the order of the item table.

    Source: arXiv 2306.01792, data set ML (tasks T1 to T3, 30 items). Differs: users are users and not stretches of 30
    events; users with fewer than two ratings below 4 are left out and counted; T4 to T6 are added.

    Args:
        source: `MovieLensSource` of the 1M archive, or a `ParquetSource` with ratings as values and the same labels.
        split: what to hold out; default: by user.
        max_items: L, positions of a sequence, >= 2.
        max_targets: of T2 and T3 the most recent ones of each user, >= 1; None: all.

    Raises:
        ConfigError: the source has no ratings, or lacks the profile labels.
    """
    log, split = read_log(source), split or TaskSplit()
    if np.isnan(log.values).any():
        raise ConfigError(f"{np.isnan(log.values).sum()} events have no rating: T1 to T3 need one, give MovieLens data")
    builder = TaskBuilder(log, log.values < 4, split, max_items)
    tasks = [
        builder.next_item("T1"),
        builder.items("T2", log.values == 4, max_targets),
        builder.items("T3", log.values == 5, max_targets),
        *(builder.profile(f"T{number}", label) for number, label in enumerate(MOVIELENS_LABELS, 4)),
    ]
    return builder.task_set(tasks)


def synthetic_tasks(
    source: SyntheticSource, split: TaskSplit | None = None, max_items: int = 30, max_targets: int = 5
) -> TaskSet:
    """Six tasks of the synthetic world, from search over categories to the profile.

    T1 next query; T2 a product among the user's most recent purchases; T3 minor category (the topic) and T4 major
    category (the department) of the most recent purchase; T5 gender, T6 age band. Queries and purchases share nothing
    but the user's interests, and labels are noisy functions of these: see `sources.world`.

    Source: arXiv 2306.01792, the order of tasks of its data set NAVER Shopping. Differs: T2 is purchases, not later
    queries; six age bands; sizes are the source's.

    Args:
        source: the world and its users.
        split: what to hold out; default: by user.
        max_items: L, positions of a sequence, >= 2.
        max_targets: most recent purchases that T2 asks for, >= 1; one bought twice is one sample.
    """
    log, split = read_log(source), split or TaskSplit()
    is_purchase = log.services == "shop"
    builder = TaskBuilder(log, log.services == "search", split, max_items)
    world = build_world(source)
    users, bought = builder.recent(is_purchase, 1)
    digits = pc.utf8_slice_codeunits(log.item_ids.take(pa.array(bought)), len("shop-"), None)
    topics = world.topics_of(digits.cast(pa.int64()).to_numpy(zero_copy_only=False))
    topic_names = world.topic_words
    departments, department_names = world.department_of_topic[topics], world.department_words
    tasks = [
        builder.next_item("T1"),
        builder.items("T2", is_purchase, max_targets),
        builder.task("T3", "label", users, topics, lambda code: topic_names[code]),
        builder.task("T4", "label", users, departments, lambda code: department_names[code]),
        *(builder.profile(f"T{number}", label) for number, label in enumerate(SYNTHETIC_LABELS, 5)),
    ]
    return builder.task_set(tasks)
