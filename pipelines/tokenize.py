"""Stage `tokenize`: `ingest/` -> `shards/`, the same shards with token ids instead of item texts; features of items."""

from pathlib import Path

from pipelines import ingest
from pipelines.job import Draft, Job
from userrep.data.featurize import featurize
from userrep.data.ingest import tokenize_shards
from userrep.data.parse import ITEMS
from userrep.data.tokenizer import TOKENIZER_NAME, build_tokenizer, read_texts, tokenizer_digest
from userrep.manifest import sha256_file

TABLE = "shards"


def run(job: Job) -> None:
    """Runs the stage."""
    config = job.config.tokenize

    def write(draft: Draft) -> None:
        source = job.path(ingest.TABLE)
        facts = job.manifest(ingest.TABLE).facts
        item_files = sorted((source / ITEMS).glob("part-*.parquet"))
        tokenizer = build_tokenizer(config, read_texts(item_files, config.max_training_items))
        tokenizer_path = draft.directory / TOKENIZER_NAME
        tokenizer.save(str(tokenizer_path))
        with job.console.progress("tokenize", "items") as advance:
            num_tokens = tokenize_shards(
                source, draft.directory, facts["shards"], tokenizer_path, config.attributes, advance
            )
        features = {}
        if config.features:
            items, information_KK = featurize(source, config.features)
            items.save(draft.directory)
            features["mutual_information"] = information_KK.tolist()
        num_items = sum(group["items"] for shard in facts["shards"] for group in shard["row_groups"])
        draft.commit(
            "shards",
            {
                "rows": num_items,
                "users": facts["users"],
                "events": facts["rows"],
                "services": facts["services"],
                "shards": facts["shards"],
                "tokens_per_item": num_tokens / max(1, num_items),
                "vocab_size": tokenizer.get_vocab_size(),
                "tokenizer": config.name,
                "tokenizer_digest": tokenizer_digest(tokenizer, config.attributes),
                "has_keys": config.attributes is not None,
                **features,
            },
        )

    resolved = {
        **config.model_dump(mode="json"),
        "file": sha256_file(Path(config.name)) if Path(config.name).is_file() else "",
    }
    job.run_stage("tokenize", TABLE, resolved, (ingest.TABLE,), write)
