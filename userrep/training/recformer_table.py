"""A pretrained Recformer from its committed table."""

from pathlib import Path

from userrep.config import ConfigError
from userrep.data.tokenizer import TOKENIZER_NAME
from userrep.data.vocabulary import Vocabulary, read_vocabulary
from userrep.manifest import read_manifest, verify_files
from userrep.models.recformer import Recformer, RecformerConfig
from userrep.training.checkpoint import MODEL_FILE, load_model


def load_recformer(directory: Path) -> tuple[Recformer, Vocabulary]:
    """The model of a table with its weights and tokenizer.json, in evaluation mode, and the vocabulary of its tokens.

    Raises:
        ConfigError: the table holds another kind of model.
        CheckpointMismatchError: the weights are of another shape.
        IncompleteTableError: there is no such table, or a file of it is damaged.
    """
    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    system = manifest.config.get("system")
    if system != "recformer":
        raise ConfigError(
            f"{directory} holds a table {manifest.table!r} of system {system!r}, and only a Recformer can be "
            "fine-tuned for next items: give the `encoder` table of a job with pretrain.system=recformer"
        )
    vocabulary = read_vocabulary(directory / TOKENIZER_NAME)
    # Facts, not the config: a backbone has a shape of its own, and may have more embeddings than there are tokens.
    model = Recformer(RecformerConfig.parse(manifest.facts["model"]), manifest.facts["num_embeddings"])
    load_model(directory / MODEL_FILE, model)
    return model.eval(), vocabulary
