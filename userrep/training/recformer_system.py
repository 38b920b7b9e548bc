"""Recformer as the training loop sees it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from userrep.config import ConfigError
from userrep.data.batch import HistoryBatch
from userrep.data.item_sequences import item_sequences
from userrep.data.pool import load_pool
from userrep.data.tokenizer import TOKENIZER_NAME
from userrep.data.vocabulary import Vocabulary
from userrep.manifest import read_manifest
from userrep.models.recformer import Recformer
from userrep.models.recformer_weights import load_backbone
from userrep.training.encoding import MemoryConfig
from userrep.training.recformer_encoding import encode_sequences
from userrep.training.recformer_objective import RecformerObjective
from userrep.training.settings import RecformerPretraining
from userrep.training.system import Validate
from userrep.training.validation import gather_pool, next_item_metrics


class RecformerSystem:
    """A pretraining run of Recformer on tokenized shards."""

    def __init__(self, config: RecformerPretraining, shards: Path) -> None:
        """Raises ConfigError: the shards have no keys."""
        self._config, self._shards, self._facts = config, shards, read_manifest(shards).facts
        if not self._facts.get("has_keys"):
            raise ConfigError(
                f"{shards} holds plain texts, and Recformer reads attributes with keys: "
                "set source.keep_attributes=true and tokenize.attributes={}"
            )
        self.vocabulary = Vocabulary.of(Tokenizer.from_file(str(shards / TOKENIZER_NAME)))

    def build_model(self) -> Recformer:
        """A new encoder, or one that starts from the backbone of the config.

        Raises:
            ConfigError: the backbone cannot be loaded, or has another vocabulary than the shards.
        """
        name = self._config.backbone
        if name is None:
            return Recformer(self._config.model, self.vocabulary.size)
        with torch.device("cpu"):  # its weights are read even where only a shape is asked for
            model = load_backbone(name, self._config.model)
        if model.token_embedding.num_embeddings < self.vocabulary.size:
            raise ConfigError(
                f"backbone {name!r} has {model.token_embedding.num_embeddings} token embeddings, and the shards "
                f"{self.vocabulary.size} tokens: tokenize them with its own tokenizer (tokenize.name={name})"
            )
        return model

    def build_objective(self, model: Recformer, memory: MemoryConfig) -> RecformerObjective:
        """Contrast with the next item, and the masked language model."""
        config = self._config
        return RecformerObjective(model, self.vocabulary, config.loss, memory, config.precision, config.seed)

    @property
    def has_idle_parameters(self) -> bool:
        """None are idle."""
        return False

    def load_validation(self) -> Validate:
        """The last items of the first validation users, given what came before."""
        config = self._config
        pool = load_pool(self._shards, self._facts["shards"], config.views, "validation", config.pool_size)

        def validate(model: Recformer) -> dict[str, float]:
            device, scale = model.token_embedding.weight.device, float(model.logit_scale.exp())
            vectors = gather_pool(lambda b: encode_batch(model, self.vocabulary, b), pool, model.dim, device)
            return next_item_metrics(*vectors, scale)

        return validate


def encode_batch(model: Recformer, vocabulary: Vocabulary, batch: HistoryBatch) -> torch.Tensor:
    """Vectors of all histories of a batch, (H, D), L2 norm 1, without a graph."""
    config = model.config
    return encode_sequences(model, item_sequences(batch, vocabulary.cls_id, config.max_items, config.max_tokens))
