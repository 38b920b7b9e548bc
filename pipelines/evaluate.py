"""Stage `evaluate`: the encoder against baselines, on the same held-out users and candidates -> `evaluation/`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from pipelines import pretrain, tokenize
from pipelines.job import Draft, Job
from pipelines.teach import encoder_table
from userrep.data.pool import Pool, load_pool
from userrep.data.sources.oracle import History, oracle_scores
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.views import Samples
from userrep.evaluation.baselines import popularity_scores, random_scores, tfidf_scores, training_counts
from userrep.evaluation.ranking import compare_retrieval, retrieval_hits
from userrep.evaluation.retrieval import head_items, sliced_means
from userrep.models.bag_of_tokens import BagOfTokens
from userrep.models.clue import Clue
from userrep.publishing.quality import QUALITY_NAME, quality_rows
from userrep.training.encoders import TrainedEncoder, TwoTowerEncoder, open_encoder
from userrep.training.local import train_bag_of_tokens, train_without_blocks
from userrep.training.settings import CluePretraining
from userrep.training.two_tower_system import corpus_scores, pool_rows
from userrep.training.validation import encode_pool, gather_pool

TABLE = "evaluation"
RESULTS = "retrieval.json"


def run(job: Job) -> None:
    """Runs the stage."""
    config, encoder = job.config.evaluate, encoder_table(job)

    def write(draft: Draft) -> None:
        shards = job.path(tokenize.TABLE)
        facts = job.manifest(tokenize.TABLE).facts
        pool = load_pool(shards, facts["shards"], job.config.pretrain.views, "test", config.pool_size)
        trained = open_encoder(job.path(encoder))
        hits = {"encoder": _hits(job, *_encoder_scores(trained, pool))}
        if encoder != pretrain.TABLE:
            hits["pretrained"] = _hits(job, *_encoder_scores(open_encoder(job.path(pretrain.TABLE)), pool))
        hits["random"] = _hits(job, random_scores(len(pool)))
        hits["popularity"] = _hits(job, popularity_scores(pool, shards, facts["shards"]))
        hits["tfidf"] = _hits(
            job, tfidf_scores(pool, shards, facts["shards"], facts["vocab_size"], config.num_idf_histories)
        )
        if isinstance(job.config.pretrain, CluePretraining):
            hits |= _trained_rivals(job, pool)
        if isinstance(job.config.source, SyntheticSource):
            hits["oracle"] = _hits(job, *_oracle_scores(job.config.source, pool))
        results: dict[str, Any] = compare_retrieval(hits, own="encoder")
        results["systems"] = list(hits)
        if isinstance(trained, TwoTowerEncoder):
            results["corpus"] = _corpus_retrieval(trained, pool, shards, facts["shards"])
        results["slices"] = slices_of(pool.samples, hits["encoder"])
        values = {f"test/recall_at_{k}": hits_P.tolist() for k, hits_P in hits["encoder"].items()}
        pq.write_table(quality_rows(pool.user_ids(), values), draft.directory / QUALITY_NAME)
        (draft.directory / RESULTS).write_text(json.dumps(results, indent=1))
        draft.commit("evaluation", {"rows": len(pool), "pool": len(pool), "views": pool_description(job), **results})

    resolved: dict[str, Any] = {
        "evaluate": config.model_dump(mode="json"),
        "pretrain": job.config.pretrain.model_dump(mode="json"),
    }
    inputs = tuple(dict.fromkeys((tokenize.TABLE, pretrain.TABLE, encoder)))
    job.run_stage("evaluate", TABLE, resolved, inputs, write)


def slices_of(samples: Samples, hits: dict[int, np.ndarray]) -> dict[str, dict[str, float]]:
    """Recall of users with few events and with many, by the median of the pool.

    Args:
        samples: one of each user, (P,).
        hits: from `retrieval_hits`.
    """
    events_P = samples.anchor_lengths + samples.positive_lengths
    middle = int(np.median(events_P))
    slices = {f"up to {middle} events": events_P <= middle, f"more than {middle} events": events_P > middle}
    return {
        name: {
            "users": int(is_in_P.sum()),
            **{f"recall_at_{k}": float(hit_P[is_in_P].mean()) for k, hit_P in hits.items()},
        }
        for name, is_in_P in slices.items()
        if is_in_P.any()
    }


def pool_description(job: Job) -> str:
    """What is retrieved, in words."""
    if _is_next_item(job):
        return "the last item of a user's history, given those before it"
    if job.config.pretrain.views.kinds[0] == "time":
        return "the later half of a user's history, given the earlier half (and the reverse)"
    return "a user's history in one service, given that in another (and the reverse)"


def _is_next_item(job: Job) -> bool:
    return job.config.pretrain.views.kinds[0] == "next_item"


def _hits(job: Job, scores_PP: np.ndarray, backward_PP: np.ndarray | None = None) -> dict[int, np.ndarray]:
    """Hits of every user, both directions; of next items only the one that is asked for: users choose among items."""
    if _is_next_item(job):
        return retrieval_hits(scores_PP, scores_PP)
    return retrieval_hits(scores_PP, backward_PP)


def _encoder_scores(encoder: TrainedEncoder, pool: Pool) -> tuple[np.ndarray]:
    anchor_PD, positive_PD = gather_pool(encoder.encode_views, pool, encoder.dim, torch.device("cpu"))
    return (anchor_PD @ positive_PD.T,)


def _trained_rivals(job: Job, pool: Pool) -> dict[str, dict[int, np.ndarray]]:
    """Hits of smaller models that are trained as the encoder was."""
    config, shards = job.config.evaluate, job.path(tokenize.TABLE)
    models: dict[str, BagOfTokens | Clue] = {}
    if config.bag_of_tokens_steps:
        with job.console.progress("evaluate: bag of tokens", "users") as advance:
            models["bag_of_tokens"] = train_bag_of_tokens(
                shards, job.config.clue, config.bag_of_tokens_steps, config.bag_of_tokens_dim, advance
            )
    if config.without_blocks:
        with job.console.progress("evaluate: encoder without blocks", "users") as advance:
            models["without_blocks"] = train_without_blocks(shards, job.config.clue, advance)
    vectors = {name: encode_pool(model, pool) for name, model in models.items()}
    return {name: _hits(job, anchor_PD @ positive_PD.T) for name, (anchor_PD, positive_PD) in vectors.items()}


def _corpus_retrieval(
    encoder: TwoTowerEncoder, pool: Pool, directory: Path, shards: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Recall and MAP among all items, of all test users and of those with a popular and with a rare next item."""
    query_rows_P, target_rows_P = pool_rows(pool, encoder.items)
    scores = corpus_scores(encoder.model, encoder.items, query_rows_P, target_rows_P)
    is_head_N = head_items(training_counts(encoder.items.keys, directory, shards))
    return sliced_means(scores, is_head_N[target_rows_P])


def _oracle_scores(source: SyntheticSource, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    anchors, positives = ([History(*events) for events in view] for view in pool.view_events())
    users = pool.user_ids()
    return oracle_scores(source, users, positives), oracle_scores(source, users, anchors)
