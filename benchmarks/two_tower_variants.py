"""The self-supervised two-tower model against its variants: quality of retrieval among all items of a corpus.

    python -m benchmarks.two_tower_variants --dataset amazon2014 --data DIR --runs FILE.jsonl --stages compare

Every run is a line of JSON, and one that the file holds already is not repeated, so a command can be cut and repeated.
Runs of one seed share their batches and initial weights. The regulariser sees half as many items as
the main loss. Stages: `steps` (plain, measured on its way), `alpha` and
`dropout` (on validation users), `compare` (variants on test users, with what these chose). Without stages, tables of
what the file holds are printed.

Source: Yao et al. 2021 (arXiv 2007.12865, section 4).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.harness import environment
from benchmarks.next_item_corpus import NextItemCorpus, build_corpus
from benchmarks.two_tower_findings import Run, chosen_alpha, chosen_dropout, key_of, read_runs, report
from userrep.config import Config
from userrep.data.augment import AugmentConfig
from userrep.data.batch import UserBatch
from userrep.data.feature_vocabulary import FeatureConfig, FeatureKind
from userrep.data.sources.parquet import ParquetSource
from userrep.data.stream import open_stream
from userrep.data.views import ViewConfig
from userrep.evaluation.retrieval import corpus_ranks, retrieval_scores, sliced_means
from userrep.models.two_tower import TwoTower, TwoTowerConfig
from userrep.training.two_tower_encoding import build_two_tower, encode_rows
from userrep.training.two_tower_objective import VARIANTS, TwoTowerLossConfig, TwoTowerObjective, variant

Stage = Literal["steps", "alpha", "dropout", "compare"]
STAGES: tuple[Stage, ...] = ("steps", "alpha", "dropout", "compare")
ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0)
DROPOUTS = (0.1, 0.3, 0.5)
TUNED = ("cfm", "rfm", "so")  # the other variants take the alpha of the one that they are made from
NUM_WORDS = 8192  # words of titles with an id of their own
MEASURED = 8  # times on the way of a run of the stage `steps`
MAX_PAIRS = 2  # of a held-out history, the last ones


@dataclass(frozen=True)
class Dataset:
    """Columns of raw tables, and the features that are made of them."""

    text_columns: tuple[str, ...]
    kinds: dict[str, FeatureKind]

    def source(self, path: Path) -> ParquetSource:
        """The raw tables."""
        return ParquetSource(path=path, text_columns=self.text_columns, keep_attributes=True)

    def configs(self, dim: int) -> list[FeatureConfig]:
        """Features, each of the attribute of its name."""
        return [
            FeatureConfig(
                name=name, kind=kind, attribute=name, dim=dim, vocabulary_size=NUM_WORDS if kind == "bag" else None
            )
            for name, kind in self.kinds.items()
        ]


DATASETS = {
    "amazon2014": Dataset(
        ("title|keywords", "categories", "brand"),
        {"id": "id", "brand": "categorical", "categories": "multi_hot", "title": "bag"},
    ),
    # Most items have no brand: a view that shows nothing but the brand is the same for all of them.
    "amazon2014_no_brand": Dataset(
        ("title|keywords", "categories"), {"id": "id", "categories": "multi_hot", "title": "bag"}
    ),
    "yelp2019": Dataset(("title", "categories"), {"id": "id", "title": "bag", "categories": "multi_hot"}),
}


class RunConfig(Config):
    """One run; equal configs are the same run."""

    stage: Stage
    dataset: str
    variant: str
    share: float = 1.0  # of the training samples
    seed: int = 0
    num_steps: int
    batch_size: int = 512
    learning_rate: float = 0.01  # of Adagrad
    embedding_dim: int = 16
    model: TwoTowerConfig = TwoTowerConfig(hidden_dims=(128, 64))
    loss: TwoTowerLossConfig


class Bench:
    """A corpus, and the batches that were drawn from it last."""

    def __init__(self, corpus: NextItemCorpus) -> None:
        self.corpus = corpus
        self._key: tuple[object, ...] = ()
        self._batches: list[UserBatch] = []

    def batches(self, config: RunConfig) -> list[UserBatch]:
        """Batches of all steps: the most recent event before a target, which is any but the first one, and it."""
        key = (config.seed, config.share, config.num_steps, config.batch_size)
        if key != self._key:
            views, augment = ViewConfig(kinds=("next_item",), max_events=1), AugmentConfig(max_events=1)
            run = (config.batch_size, config.seed, config.num_steps, config.share)
            self._key, self._batches = key, list(open_stream([self.corpus.shards], views, augment, *run).batches())
        return self._batches

    def run(self, config: RunConfig) -> dict[str, Any]:
        """Trains a model and measures it on validation users, and where variants are compared on test users."""
        batches, items = self.batches(config), self.corpus.items
        started = time.process_time()
        torch.manual_seed(config.seed)
        model = build_two_tower(config.model, items)
        objective = TwoTowerObjective(model, items, self.corpus.information, config.loss, config.seed)
        optimizer = torch.optim.Adagrad(model.parameters(), lr=config.learning_rate, fused=True)
        on_the_way, every = {}, max(1, config.num_steps // MEASURED)
        recent: list[dict[str, float]] = []
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            loss, metrics = objective(batch)
            loss.backward()
            optimizer.step()
            recent = [*recent[-49:], metrics]
            if config.stage == "steps" and (batch.step + 1) % every == 0:
                on_the_way[batch.step + 1] = measure(model, self.corpus, "validation")["all"]
        splits = ("validation", "test") if config.stage == "compare" else ("validation",)
        return {
            "last_losses": {
                name: float(np.mean([m[f"train/{name}"] for m in recent])) for name in ("main_loss", "regulariser")
            },
            "on_the_way": on_the_way,
            "train_cpu_s": time.process_time() - started,
            **{split: measure(model, self.corpus, split) for split in splits},
        }


def measure(model: TwoTower, corpus: NextItemCorpus, split: str) -> dict[str, dict[str, float]]:
    """Recall and MAP among all items but the query's own: of all pairs, of those with a head and with a tail item."""
    pairs, items = corpus.held_out[split], corpus.items
    unique_U, place_Q = np.unique(pairs.items, return_inverse=True)
    query_QD = encode_rows(model, items, unique_U, as_queries=True)[place_Q]
    ranks = corpus_ranks(query_QD, encode_rows(model, items, np.arange(len(items))), pairs.targets, pairs.items)
    return sliced_means(retrieval_scores(*ranks), corpus.is_head[pairs.targets])


def plan_runs(stage: Stage, arguments: argparse.Namespace, done: list[Run]) -> Iterator[RunConfig]:
    """Runs of a stage, seed after seed, so that a cut leaves all variants with the same seeds."""
    common = {"corrects_frequency": arguments.corrects_frequency, "corpus_batch_size": arguments.batch_size // 2}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for share, num_steps in zip(arguments.shares, arguments.steps, strict=True):
            fixed = {"stage": stage, "dataset": arguments.dataset, "share": share, "seed": seed}
            fixed |= {"num_steps": num_steps, "batch_size": arguments.batch_size}
            for name, changes in _changes(stage, arguments, share, done):
                values = variant(name, TwoTowerLossConfig.parse(common)).model_dump(mode="json")
                augmentation = {**values["augmentation"], **changes.pop("augmentation", {})}
                loss = {**values, **changes, "augmentation": augmentation}
                yield RunConfig.parse({**fixed, "variant": name, "loss": loss})


def _changes(
    stage: Stage, arguments: argparse.Namespace, share: float, done: list[Run]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Variants of a stage, and what their losses have beside the variant itself."""
    where = (arguments.dataset, share)
    for name in arguments.variants:
        has_alpha, has_rate = name not in ("plain", "fd"), name not in ("plain", "so", "cfm_no_dropout")
        if stage == "alpha" and name in TUNED:
            yield from ((name, {"alpha": alpha}) for alpha in arguments.alphas)
        elif stage == "dropout" and name in ("cfm", "fd"):
            alpha = {"alpha": chosen_alpha(done, *where, name)} if has_alpha else {}
            yield from ((name, alpha | _rate(name, rate)) for rate in DROPOUTS)
        elif stage == "compare":
            alpha = {"alpha": chosen_alpha(done, *where, name)} if has_alpha else {}
            yield name, alpha | (_rate(name, chosen_dropout(done, *where, name)) if has_rate else {})
        elif stage == "steps" and name == "plain":
            yield name, {}


def _rate(name: str, rate: float) -> dict[str, Any]:
    return {"feature_dropout": rate} if name == "fd" else {"augmentation": {"value_dropout": rate}}


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(DATASETS), default="amazon2014")
    parser.add_argument("--data", type=Path, help="directory of its raw tables")
    parser.add_argument("--runs", type=Path, required=True, help="file of JSON lines that runs are appended to")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=())
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.1], help="of the training samples")
    parser.add_argument("--steps", nargs="+", type=int, default=[1000, 500], help="of a run, one for every share")
    parser.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS), help="tried in the stage alpha")
    parser.add_argument("--seeds", type=int, default=5, help="number of them")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--corrects-frequency", action="store_true", help="logQ in the main loss of all variants")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Runs what is not in the file yet, or prints what is."""
    arguments = parse_arguments(given)
    if not arguments.stages:
        print(report(read_runs(arguments.runs)))
        return
    facts = environment("two_tower_variants", ())
    dataset = DATASETS[arguments.dataset]
    with tempfile.TemporaryDirectory() as directory:
        dim = RunConfig.model_fields["embedding_dim"].default
        bench = Bench(build_corpus(dataset.source(arguments.data), dataset.configs(dim), Path(directory), MAX_PAIRS))
        for stage in arguments.stages:
            for config in plan_runs(stage, arguments, read_runs(arguments.runs)):
                described = config.model_dump(mode="json")
                if key_of(described) in {key_of(run["config"]) for run in read_runs(arguments.runs)}:
                    continue
                line = {"config": described, **bench.run(config), **facts}
                with arguments.runs.open("a") as stream:
                    stream.write(json.dumps(line) + "\n")
                place = (
                    f"{stage} {config.variant}, share {config.share:g}, seed {config.seed}, alpha {config.loss.alpha:g}"
                )
                print(place, line["validation"]["all"], flush=True)


if __name__ == "__main__":
    main()
