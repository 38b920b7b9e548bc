"""Stage `evaluate`: the encoder against baselines, on the same held-out users and candidates -> `evaluation/`."""

import json
from typing import Any

import numpy as np

from pipelines import pretrain, tokenize
from pipelines.job import Draft, Job
from pipelines.teach import encoder_table
from userrep.data.pool import Pool, load_pool
from userrep.data.sources.oracle import History, oracle_scores
from userrep.data.sources.synthetic import SyntheticSource
from userrep.evaluation.baselines import popularity_scores, random_scores, tfidf_scores
from userrep.evaluation.ranking import compare_retrieval, retrieval_hits
from userrep.training.checkpoint import load_encoder
from userrep.training.local import train_bag_of_tokens, train_without_blocks
from userrep.training.validation import encode_pool

TABLE = "evaluation"
RESULTS = "retrieval.json"


def run(job: Job) -> None:
    """Runs the stage."""
    config, encoder = job.config.evaluate, encoder_table(job)

    def write(draft: Draft) -> None:
        shards = job.path(tokenize.TABLE)
        facts = job.manifest(tokenize.TABLE).facts
        pool = load_pool(shards, facts["shards"], job.config.pretrain.views, "test", config.pool_size)
        hits: dict[str, dict[int, np.ndarray]] = {}
        hits["encoder"] = _vector_hits(*encode_pool(load_encoder(job.path(encoder)), pool))
        if encoder != pretrain.TABLE:
            hits["pretrained"] = _vector_hits(*encode_pool(load_encoder(job.path(pretrain.TABLE)), pool))
        hits["random"] = retrieval_hits(random_scores(len(pool)))
        hits["popularity"] = retrieval_hits(popularity_scores(pool, shards, facts["shards"]))
        hits["tfidf"] = retrieval_hits(
            tfidf_scores(pool, shards, facts["shards"], facts["vocab_size"], config.num_idf_histories)
        )
        if config.bag_of_tokens_steps:
            with job.console.progress("evaluate: bag of tokens", "users") as advance:
                bag = train_bag_of_tokens(
                    shards, job.config.pretrain, config.bag_of_tokens_steps, config.bag_of_tokens_dim, advance
                )
            hits["bag_of_tokens"] = _vector_hits(*encode_pool(bag, pool))
        if config.without_blocks:
            with job.console.progress("evaluate: encoder without blocks", "users") as advance:
                ablated = train_without_blocks(shards, job.config.pretrain, advance)
            hits["without_blocks"] = _vector_hits(*encode_pool(ablated, pool))
        if isinstance(job.config.source, SyntheticSource):
            hits["oracle"] = _oracle_hits(job.config.source, pool)
        results = compare_retrieval(hits, own="encoder")
        (draft.directory / RESULTS).write_text(json.dumps(results, indent=1))
        draft.commit("evaluation", {"rows": len(pool), "pool": len(pool), "views": pool_description(job), **results})

    resolved: dict[str, Any] = {
        "evaluate": config.model_dump(mode="json"),
        "pretrain": job.config.pretrain.model_dump(mode="json"),
    }
    inputs = tuple(dict.fromkeys((tokenize.TABLE, pretrain.TABLE, encoder)))
    job.run_stage("evaluate", TABLE, resolved, inputs, write)


def pool_description(job: Job) -> str:
    """What is retrieved, in words."""
    if job.config.pretrain.views.kinds[0] == "time":
        return "the later half of a user's history, given the earlier half (and the reverse)"
    return "a user's history in one service, given that in another (and the reverse)"


def _vector_hits(anchor_PD: np.ndarray, positive_PD: np.ndarray) -> dict[int, np.ndarray]:
    return retrieval_hits(anchor_PD @ positive_PD.T)


def _oracle_hits(source: SyntheticSource, pool: Pool) -> dict[int, np.ndarray]:
    anchors, positives = ([History(*events) for events in view] for view in pool.view_events())
    users = pool.user_ids()
    return retrieval_hits(oracle_scores(source, users, positives), oracle_scores(source, users, anchors))
