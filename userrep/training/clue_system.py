"""CLUE as the training loop sees it."""

from pathlib import Path

import torch

from userrep.config import ConfigError
from userrep.data.pool import load_pool
from userrep.data.tokenizer import read_idf
from userrep.manifest import read_manifest
from userrep.models.clue import Clue
from userrep.training.encoding import MemoryConfig
from userrep.training.objective import ClueObjective
from userrep.training.settings import CluePretraining
from userrep.training.system import Validate
from userrep.training.validation import validate


class ClueSystem:
    """A pretraining run of CLUE on tokenized shards."""

    def __init__(self, config: CluePretraining, shards: Path) -> None:
        """Raises ConfigError: the tokens of the shards are flagged, as only Recformer reads them."""
        self._config, self._shards, self._facts = config, shards, read_manifest(shards).facts
        if self._facts.get("has_keys"):
            raise ConfigError(
                f"{shards} holds attributes with keys, which CLUE does not read: set tokenize.attributes=null"
            )

    def build_model(self) -> Clue:
        """A new encoder, whose token embeddings know how frequent tokens are."""
        return Clue(self._config.model, self._facts["vocab_size"], torch.from_numpy(read_idf(self._shards)))

    def build_objective(self, model: Clue, memory: MemoryConfig) -> ClueObjective:
        """The contrastive loss of the run."""
        config = self._config
        return ClueObjective(model, config.optim.bag_steps, config.loss, memory, config.precision)

    @property
    def has_idle_parameters(self) -> bool:
        """The transformer blocks, in the first steps."""
        return self._config.optim.bag_steps > 0

    def load_validation(self) -> Validate:
        """Retrieval among the first validation users."""
        config = self._config
        pool = load_pool(self._shards, self._facts["shards"], config.views, "validation", config.pool_size)
        return lambda model: validate(model, pool)
