"""Constants that the ladder derives runs from.

A rule that names the record that it was `measured_in` is a measurement; with an empty name it is an assumption, taken
over from where its docstring says, and printed as one.

Legend: `N` non-embedding parameters, `D` width, `B` users of a global batch.
"""

from pydantic import Field

from userrep.config import Config


class PowerRule(Config):
    """A learning rate: `value` at the reference, times powers of width and batch over the reference's."""

    value: float = Field(gt=0)
    width_exponent: float
    batch_exponent: float


class RateRule(Config):
    """Peak learning rates against width and batch. `scaling/learning_rate.py` measures the rule.

    The values at the reference are the defaults of `training/optim.py`. Source of the other defaults: width, muP (Yang
    et al. 2022, arXiv 2203.03466, table 3) for Adam: hidden matrices 1 / D, embeddings constant; batch, square root for
    Adam (Malladi et al. 2022, arXiv 2205.10287). Differs: attention keeps 1 / sqrt(d); vectors have the rate of
    matrices.
    """

    reference_dim: int = Field(default=128, ge=1)
    reference_batch_size: int = Field(default=512, ge=1)
    matrices: PowerRule = PowerRule(value=5e-4, width_exponent=-1.0, batch_exponent=0.5)
    embeddings: PowerRule = PowerRule(value=5e-3, width_exponent=0.0, batch_exponent=0.5)
    measured_in: str = ""  # record of the measurement; empty: assumption

    def at(self, rule: PowerRule, dim: int, batch_size: int) -> float:
        """What one of the two rules gives at a width and a batch."""
        width, batch = dim / self.reference_dim, batch_size / self.reference_batch_size
        return rule.value * width**rule.width_exponent * batch**rule.batch_exponent


class BatchRule(Config):
    """Users of a global batch against the size of the model.

    Source: LMRec (arXiv 2212.03760, table 9), by CLUE's first authors, takes 256, 512 and 1,024 samples at blocks of
    49,152, 786,432 and 6,291,456 parameters: exponent log(4) / log(128). CLUE's authors say that batch and model must
    grow together, without numbers (DEVIEW 2021).
    """

    reference_parameters: float = Field(default=786_432, gt=0)
    batch_size: int = Field(default=512, ge=2)
    exponent: float = 0.29
    measured_in: str = ""


class DurationRule(Config):
    """Samples of a run.

    Source: 20 tokens a parameter (Hoffmann et al. 2022, arXiv 2203.15556, table 3). Differs: those are tokens of
    language models; here, tokens of the unique items of a batch.
    """

    tokens_per_parameter: float = Field(default=20, gt=0)
    tokens_per_sample: float = Field(default=100, gt=0)  # unique tokens that a user of a batch adds to it
    min_steps: int = Field(default=300, ge=1)  # small models: embeddings need steps, whatever the blocks' size is
    measured_in: str = ""


class LadderConfig(Config):
    """Constants of all derivations."""

    mlp_ratio: int = Field(default=4, ge=1)
    head_ratio: int = Field(default=2, ge=1)
    aspect_ratio: float = Field(default=32, gt=0)  # width over blocks
    head_dim: int = Field(default=64, ge=8)
    rate: RateRule = RateRule()
    batch: BatchRule = BatchRule()
    duration: DurationRule = DurationRule()
