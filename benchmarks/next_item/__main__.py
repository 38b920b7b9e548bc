"""Next-item rivals on one protocol: `python -m benchmarks.next_item --data DIR --set NAME [--json FILE]`.

Leave-one-out, the right item ranked among all items of the catalogue (`userrep/data/leave_one_out.py`,
`userrep/evaluation/next_item_ranking.py`). Every system is tuned over the grid in its file by validation NDCG@10; the
trained ones stop early by it, and the best setting is trained with all seeds. `--users` leaves the values of every
user, for paired comparisons with a system that is not run here.
"""

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import environment
from benchmarks.next_item.bert4rec import BERT4REC
from benchmarks.next_item.data_set import DataSet, load_data_set
from benchmarks.next_item.popularity import POPULARITY
from benchmarks.next_item.sasrec import SASREC
from benchmarks.next_item.system import System
from benchmarks.next_item.tf_idf import TF_IDF
from benchmarks.next_item.tuning import Tuned, half_fraction, result, tune
from benchmarks.next_item.unisrec import UNISREC
from userrep.evaluation.next_item_ranking import METRICS

SYSTEMS: dict[str, System] = {
    "popularity": POPULARITY,
    "tf_idf": TF_IDF,
    "sasrec": SASREC,
    "bert4rec": BERT4REC,
    "unisrec": UNISREC,
}
TITLES = {"ndcg_at_10": "NDCG@10", "recall_at_10": "Recall@10", "mrr": "MRR"}


def main() -> None:
    """Tunes, trains and ranks the systems on one set, and prints the table."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    facts = {
        "set": arguments.set,
        "text_columns": arguments.text_columns,
        "share": arguments.share,
        "tried": arguments.grid,
    }
    facts |= {"share_seed": arguments.share_seed, **environment("next_item", ("scikit-learn", "scipy", "pyarrow"))}
    with ExitStack() as stack:
        workdir = arguments.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = load_data_set(arguments.set, arguments.data, workdir, tuple(arguments.text_columns))
    data = replace(data, train_users=data.split.train_share(arguments.share, arguments.share_seed))
    found = {}
    for name in arguments.systems:
        system = SYSTEMS[name]
        if arguments.grid == "half" and system.is_seeded:
            system = system._replace(grid=half_fraction(system.grid))
        found[name] = tune(name, system, data, arguments.seeds, lambda line: print(line, flush=True))
        if arguments.json:
            with arguments.json.open("a") as stream:
                stream.write(json.dumps({**facts, **result(name, data, found[name])}) + "\n")
    _show(data, found)
    if arguments.users:
        pq.write_table(user_values(data, found), arguments.users)


def user_values(data: DataSet, found: dict[str, Tuned]) -> pa.Table:
    """A row for every system, seed and asked user: `system`, `seed`, `user_id`, `is_cold`, and the metrics."""
    user_ids, is_cold = (
        data.split.user_ids.take(pa.array(data.split.asked)),
        data.split.is_cold("test", data.train_users),
    )
    parts = [
        pa.table(
            {
                "system": pa.repeat(name, len(user_ids)),
                "seed": pa.repeat(seed, len(user_ids)),
                "user_id": user_ids,
                "is_cold": is_cold,
                **outcome.test.values(),
            }
        )
        for name, tuned in found.items()
        for seed, outcome in tuned.outcomes.items()
    ]
    return pa.concat_tables(parts)


def _show(data: DataSet, found: dict[str, Tuned]) -> None:
    split = data.split
    users = f"{len(split.asked):,} users asked, {len(data.train_users):,} trained on"
    title = f"{data.name}: {users}, {split.num_items:,} items"
    table = Table("system", "test users", *TITLES.values(), title=title)
    for name, tuned in found.items():
        for part, metrics in result(name, data, tuned)["test"].items():
            if metrics["num_users"]:
                cells = [_cell(metrics[metric]) for metric in METRICS]
                table.add_row(name if part == "all" else "", f"{part} ({metrics['num_users']:,})", *cells)
    Console(width=120).print(table)


def _cell(interval: dict[str, float | None]) -> str:
    mean = f"{interval['mean']:.4f}"
    return mean if interval["low"] is None else f"{mean} [{interval['low']:.4f}, {interval['high']:.4f}]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.next_item", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets' folders")
    parser.add_argument("--set", required=True, help="name of a folder with events.parquet and items.parquet")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--grid", choices=("full", "half"), default="full", help="settings tried; half: every pair once"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the training users; smaller ones are nested")
    parser.add_argument("--share-seed", type=int, default=0, help="which training users")
    parser.add_argument("--text-columns", nargs="+", default=["title", "categories", "brand"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    parser.add_argument("--workdir", type=Path, help="keeps the ingested set for the next run; default: none is kept")
    parser.add_argument("--json", type=Path, help="append a line for every system")
    parser.add_argument("--users", type=Path, help="write every user's values to this Parquet file")
    return parser


if __name__ == "__main__":
    main()
