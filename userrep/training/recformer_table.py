"""A pretrained Recformer from its committed table."""

from pathlib import Path

from tokenizers import Tokenizer

from userrep.config import ConfigError
from userrep.data.tokenizer import TOKENIZER_NAME
from userrep.data.vocabulary import Vocabulary
from userrep.manifest import read_manifest, verify_files
from userrep.models.recformer import Recformer, RecformerConfig
from userrep.training.checkpoint import MODEL_FILE, load_model


def load_recformer(directory: Path) -> tuple[Recformer, Vocabulary]:
    """The model of a table with its weights and tokenizer.json, in evaluation mode, and the vocabulary of its tokens.

    Its shape is the fact `model`, which a table has where the config's is not that of the weights (a loaded backbone),
    else `model` of the config.

    Raises:
        ConfigError: the table holds another kind of model.
        CheckpointMismatchError: the weights are of another shape.
        IncompleteTableError: there is no such table, or a file of it is damaged.
    """
    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    shape = manifest.facts.get("model") or manifest.config.get("model")
    if not isinstance(shape, dict) or shape.get("kind") != "recformer":
        kind = shape.get("kind") if isinstance(shape, dict) else None
        raise ConfigError(
            f"{directory} holds a table {manifest.table!r} of a model of kind {kind!r}, and only a Recformer can be "
            "fine-tuned: give the `encoder` table of a job with pretrain.system=recformer"
        )
    vocabulary = Vocabulary.of(Tokenizer.from_file(str(directory / TOKENIZER_NAME)))
    model = Recformer(RecformerConfig.parse(shape), vocabulary.size)
    load_model(directory / MODEL_FILE, model)
    return model.eval(), vocabulary
