"""Arrow schemas of every table that passes between stages. A column's meaning is its field metadata `doc`."""

import re
from collections.abc import Sequence

import pyarrow as pa

SCHEMA_VERSION = 1
VECTOR_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}
VECTOR_COLUMN = "embedding"
TASK_COLUMN_PREFIX = f"{VECTOR_COLUMN}_"
TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a task with a column; needs no escape in Markdown or a list with commas


def _field(name: str, type_: pa.DataType, doc: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=nullable, metadata={"doc": doc})


# What a source yields. `origin` columns let a later stage name the record that it rejects.
ITEMS = pa.schema(
    [
        _field("item_id", pa.string(), "id, unique within the data set"),
        _field("text", pa.string(), "item_text: the item's attributes, plain or with keys (`data/item_text.py`)"),
        _field("file", pa.string(), "file (or generator) that the record came from"),
        _field("line", pa.int64(), "1-based line, or row number in a columnar file"),
    ]
)

EVENTS = pa.schema(
    [
        _field("user_id", pa.string(), "id, unique within the data set"),
        _field("item_id", pa.string(), "the item that was searched, bought, rated, ..."),
        _field("service", pa.string(), "the behaviour source; one of the source's `services`"),
        _field("time", pa.int64(), "unix seconds; null where only the order is known", nullable=True),
        _field(
            "position",
            pa.int64(),
            "order within (user, service), breaks ties of time; null where unknown",
            nullable=True,
        ),
        _field("value", pa.float32(), "rating, quantity, ...; null where there is none", nullable=True),
        _field("file", pa.string(), "file (or generator) that the record came from"),
        _field("line", pa.int64(), "1-based line, or row number in a columnar file"),
    ]
)

USERS = pa.schema(
    [
        _field("user_id", pa.string(), "id, as in events"),
        _field("labels", pa.map_(pa.string(), pa.string()), "profile labels: name -> value"),
        _field("file", pa.string(), "file (or generator) that the record came from"),
        _field("line", pa.int64(), "1-based line, or row number in a columnar file"),
    ]
)

# A record that could not be used. Written to `quarantine/` beside the table it is missing from.
REJECTED = pa.schema(
    [
        _field("table", pa.string(), "items | events | users"),
        _field("file", pa.string(), "file (or generator) that the record came from"),
        _field("line", pa.int64(), "1-based line, or row number in a columnar file"),
        _field("id", pa.string(), "item or user id of a rejected item or user record, where readable", nullable=True),
        _field(
            "reason", pa.string(), "machine-readable reason, e.g. missing_id, bad_time, unknown_item, rejected_item"
        ),
        _field("record", pa.string(), "the record as it was read, cut at 500 characters"),
    ]
)

# Shards: one row is a user. Histories refer to the item dictionary of the same row group, which is the row group of
# the same number in the shard's `.items.parquet` file; so a row group is read, moved and decoded on its own.
HISTORY = pa.struct(
    [
        _field("service", pa.int8(), "index into the manifest's `services`"),
        _field("items", pa.list_(pa.int32()), "item references, oldest first"),
        _field("times", pa.list_(pa.int64()), "unix seconds of each event; null where unknown"),
        _field("values", pa.list_(pa.float32()), "value of each event; null where there is none"),
    ]
)

SHARD_USERS = pa.schema(
    [
        _field("user_id", pa.string(), "id, as in events"),
        _field("split", pa.int8(), "0 train, 1 validation, 2 test; a function of the user id and the split seed"),
        _field("histories", pa.list_(HISTORY), "one entry per service in which the user has events, by service index"),
        _field("labels", pa.map_(pa.string(), pa.string()), "profile labels: name -> value (empty when unknown)"),
    ]
)

SHARD_ITEMS_TEXT = pa.schema(
    [
        _field("item_id", pa.string(), "id, as in items"),
        _field("text", pa.string(), "item_text"),
    ]
)

SHARD_ITEMS = pa.schema(
    [
        _field("item_id", pa.string(), "id, as in items"),
        _field(
            "tokens",
            pa.list_(pa.int32()),
            "item_tokens: ids of the manifest's tokenizer, at least one; of keys with KEY_FLAG",
        ),
    ]
)


# Continual tasks: R of every cell, one score a row; a method that is taught all tasks at once has but the last j.
TASKS_MATRIX = pa.schema(
    [
        _field("method", pa.string(), "method, and its options in parentheses"),
        _field("order", pa.list_(pa.string()), "tasks in the order of training"),
        _field("seed", pa.int64(), "of the cell"),
        _field("j", pa.int32(), "place in the order of the task trained last"),
        _field("i", pa.int32(), "place of the task that was measured, i <= j"),
        _field("trained", pa.string(), "name of task j"),
        _field("task", pa.string(), "name of task i"),
        _field("metric", pa.string(), "mrr_at_5 | accuracy | recall_at_10"),
        _field("score", pa.float64(), "R(j, i), on all test samples of task i"),
    ]
)


_SCORES = pa.map_(pa.string(), pa.float64())

# A sweep: one row a cell. Scaling laws and their figures are made from this table and nothing else.
RUNS = pa.schema(
    [
        _field("cell_id", pa.string(), "hash of all values in which cells differ"),
        _field("trunk_id", pa.string(), "equal for cells that are one run up to the decay of the learning rate"),
        _field("sweep", pa.string(), "name of the sweep"),
        _field("factor", pa.string(), "arm of the design: center, model, samples, history, batch; grid; budget"),
        _field("status", pa.string(), "finished | failed | planned"),
        _field("message", pa.string(), "why a failed cell failed; empty for others"),
        _field("parameters", pa.int64(), "N, without embeddings"),
        _field("embedding_parameters", pa.int64(), "of token and position embeddings"),
        _field("dim", pa.int32(), "width of the encoder"),
        _field("item_layers", pa.int32(), "blocks of the Item Transformer"),
        _field("service_layers", pa.int32(), "blocks of the Service Transformer"),
        _field("samples", pa.int64(), "D: samples seen, each as often as it was"),
        _field("user_share", pa.float64(), "share of the training users that the cell draws from"),
        _field("epochs", pa.float64(), "times that each of its samples was seen"),
        _field("max_events", pa.int32(), "S: most events of a view in training and evaluation"),
        _field("batch_size", pa.int32(), "B: users of a global batch"),
        _field("num_steps", pa.int64(), "optimizer steps"),
        _field("learning_rate", pa.float64(), "peak, of matrices and vectors"),
        _field("embedding_learning_rate", pa.float64(), "peak, of the tables"),
        _field("learning_rate_factor", pa.float64(), "times the ladder's learning rates"),
        _field("seed", pa.int64(), "of everything that is drawn"),
        _field("flops", pa.float64(), "C: operations of the whole run over unique real tokens, counted"),
        _field("padded_flops", pa.float64(), "what a padded implementation would need"),
        _field("tokens", pa.float64(), "unique real tokens that the run encodes"),
        # What was measured: null unless the cell is finished.
        _field("loss", pa.float64(), "InfoNCE among the evaluation pool at the cell's own best temperature", True),
        _field("loss_as_trained", pa.float64(), "the same at the temperature that the cell has learned", True),
        _field("best_scale", pa.float64(), "1 / temperature that gives `loss`", True),
        _field(
            "pool_size", pa.int32(), "users of the evaluation pool, the same for all cells; chance is its log", True
        ),
        _field("recall_at_1", pa.float64(), "among the pool, mean of both directions", True),
        _field("recall_at_10", pa.float64(), "likewise", True),
        _field("downstream_losses", _SCORES, "cross-entropy of a probe on the frozen user vector, by task", True),
        _field("downstream_scores", _SCORES, "accuracy of a label, recall@10 of next_item, by task", True),
        _field(
            "curve",
            pa.list_(pa.struct([("step", pa.int64()), ("flops", pa.float64()), ("loss", pa.float64())])),
            "`loss` on the way at a constant learning rate, oldest first; shares the luck of the run, so not fitted to",
            True,
        ),
        _field(
            "train_loss", pa.float64(), "mean over the last tenth of the steps; its floor moves with the batch", True
        ),
        _field("train_s", pa.float64(), "seconds of its steps, those that it shares with other cells included", True),
        _field("evaluate_s", pa.float64(), "seconds of its evaluation", True),
        _field("flops_per_s", pa.float64(), "operations of its steps over their seconds, of all workers", True),
        _field("mfu", pa.float64(), "operations without those done twice, over the hardware's measured peak", True),
        _field("num_workers", pa.int32(), "of the lane", True),
        _field("device", pa.string(), "cpu, or name of the GPU", True),
        _field("finished_at", pa.timestamp("s", "UTC"), "when it was committed", True),
        _field("code_version", pa.string(), "of the package", True),
    ]
)


def task_column(task: str) -> str:
    """Name of the column that holds the users' vectors for a task.

    Raises:
        ValueError: the task's name cannot be part of a column's name.
    """
    if not TASK_NAME.fullmatch(task):
        raise ValueError(f"task name {task!r}: a column takes letters (A-Z, a-z), digits, _ and -; rename the task")
    return TASK_COLUMN_PREFIX + task


def scale_column(vector_column: str) -> str:
    """Name of the column with the factors of an int8 vector column: `scale`, or `scale_<task>`."""
    return "scale" + vector_column.removeprefix(VECTOR_COLUMN)


def user_embeddings(embedding_dim: int, dtype: str, tasks: Sequence[str] = ()) -> pa.Schema:
    """Schema of a published user embedding table.

    The columns of tasks are the last ones, so that those before them are the same in every table.

    Args:
        embedding_dim: width of the vectors, > 0; the same in all columns.
        dtype: `float32`, `float16` or `int8`; the same in all columns. After each column of int8 there is one of
            float32 with the factor that makes vectors of norm 1 of its integers.
        tasks: names of the tasks that have a column, in the order of the columns; each once.

    Raises:
        ValueError: an argument that is not as said here.
    """
    if isinstance(tasks, str) or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks {tasks!r}: give a list of names, each of them once")
    return pa.schema(
        [
            _field("user_id", pa.string(), "id, as in events"),
            *_vector(VECTOR_COLUMN, embedding_dim, dtype, "user vector"),
            _field("num_events", pa.int32(), "events that the vector was computed from"),
            _field("last_time", pa.int64(), "unix seconds of the latest event; null where unknown", nullable=True),
            *(
                field
                for task in tasks
                for field in _vector(
                    task_column(task),
                    embedding_dim,
                    dtype,
                    f"the user as task {task} sees it, from recent events of all services",
                )
            ),
        ]
    )


def item_embeddings(embedding_dim: int, dtype: str, tasks: Sequence[str] = ()) -> pa.Schema:
    """Schema of a published item embedding table.

    Args:
        embedding_dim: width of the vectors, > 0.
        dtype: `float32`, `float16` or `int8`, as in `user_embeddings`.
        tasks: empty; here because the schemas of all entities are made from the same facts.

    Raises:
        ValueError: an argument that is not as said here.
    """
    if len(tasks):
        raise ValueError(f"tasks {tasks!r}: an item has one vector and no column per task; leave the tasks out")
    return pa.schema(
        [
            _field("item_id", pa.string(), "id, as in items"),
            *_vector(VECTOR_COLUMN, embedding_dim, dtype, "item vector"),
        ]
    )


def _vector(name: str, embedding_dim: int, dtype: str, doc: str) -> list[pa.Field]:
    """The column of a vector, and for int8 that of its factors."""
    if dtype not in VECTOR_TYPES or embedding_dim <= 0:
        raise ValueError(
            f"no embedding column of dtype {dtype!r} and dim {embedding_dim}: use float32, float16 or int8, dim > 0"
        )
    column = pa.list_(VECTOR_TYPES[dtype], embedding_dim)
    if dtype != "int8":
        return [_field(name, column, f"{doc}, L2 norm 1")]
    scale = scale_column(name)
    return [
        _field(name, column, f"{doc}, times `{scale}` of L2 norm 1"),
        _field(scale, pa.float32(), f"factor of the integers in `{name}`"),
    ]
