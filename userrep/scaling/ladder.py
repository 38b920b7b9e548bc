"""One dial, the number of non-embedding parameters: encoder, batch, learning rates and duration of a run follow.

Every quantity is derived by one function, which returns it with its formula in numbers and its source. Constants stand
in `scaling/rules.py`; those that no measurement of this project stands behind are printed as assumptions.

Legend: `N` non-embedding parameters, `D` width, `L` blocks of both transformers, `B` users of a global batch.
"""

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from userrep.models.clue import ClueConfig
from userrep.models.cost import parameter_counts
from userrep.scaling.rules import BatchRule, DurationRule, LadderConfig, RateRule

MIN_PARAMETERS, MAX_PARAMETERS = 1e4, 1e9  # sizes at which the tests build every rung
MAX_DEVIATION = 0.1  # of a rung's parameters from what was asked for, where some depth comes that close
BATCH_MULTIPLE = 32  # users: whole vector registers, and it divides over 2, 4, 8, 16 and 32 workers
DECISION = "decision of this project"

Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class Derivation(Generic[Value]):
    """A derived quantity.

    Attributes:
        name: of the quantity.
        value: of it.
        formula: how it was computed, with numbers.
        source: of the formula.
        is_assumption: no measurement of this project stands behind its constants.
    """

    name: str
    value: Value
    formula: str
    source: str
    is_assumption: bool = False

    def __str__(self) -> str:
        """For people: two lines."""
        value = f"{self.value:,}" if isinstance(self.value, int) else f"{self.value:,.4g}"
        mark = "ASSUMPTION, not measured here; " if self.is_assumption else ""
        return f"{self.name:<24}{value:>14}  {self.formula}\n{'':<40}{mark}{self.source}"


@dataclass(frozen=True)
class Rung:
    """A size of the ladder.

    Attributes:
        target: parameters that were asked for.
        model: encoder of about so many.
        global_batch_size: users of a step.
        learning_rate: peak, of matrices and vectors.
        embedding_learning_rate: peak, of the tables.
        num_samples: that the run sees, a multiple of the batch.
        derivations: of all this, in the order in which one follows from another.
    """

    target: float
    model: ClueConfig
    global_batch_size: int
    learning_rate: float
    embedding_learning_rate: float
    num_samples: int
    derivations: tuple[Derivation, ...]

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.num_samples // self.global_batch_size

    @property
    def num_parameters(self) -> int:
        """Non-embedding parameters N of the encoder."""
        return count(self.model)

    def describe(self) -> str:
        """Every derivation with its formula and source."""
        deviation = self.num_parameters / self.target - 1
        head = f"N = {self.num_parameters:,} non-embedding parameters ({deviation:+.1%} of {self.target:,.0f})"
        return "\n".join([head, *map(str, self.derivations)])


def make_rung(num_parameters: float, config: LadderConfig, base: ClueConfig | None = None) -> Rung:
    """The rung of a size.

    Args:
        num_parameters: N, between 1e4 and 1e9.
        config: constants.
        base: encoder whose other settings (longest item, initialisation) are kept; default: the default encoder.

    Raises:
        ValueError: the size is beyond the ladder's ends.
    """
    if not MIN_PARAMETERS <= num_parameters <= MAX_PARAMETERS:
        raise ValueError(
            f"{num_parameters:,.0f} non-embedding parameters are not on the ladder: choose a size between "
            f"{MIN_PARAMETERS:,.0f} and {MAX_PARAMETERS:,.0f}"
        )
    model, shape = derive_model(num_parameters, config, base or ClueConfig())
    batch = derive_batch_size(count(model), config.batch)
    rates = derive_learning_rates(model.dim, batch.value, config.rate)
    samples = derive_samples(count(model), batch.value, config.duration)
    return Rung(
        target=num_parameters,
        model=model,
        global_batch_size=batch.value,
        learning_rate=rates[0].value,
        embedding_learning_rate=rates[1].value,
        num_samples=samples.value,
        derivations=(*shape, batch, *rates, samples),
    )


def count(model: ClueConfig) -> int:
    """Non-embedding parameters."""
    return parameter_counts(model, 1)["non_embedding"]


def derive_model(
    num_parameters: float, config: LadderConfig, base: ClueConfig
) -> tuple[ClueConfig, tuple[Derivation, ...]]:
    """Encoder of about so many parameters, and how every number of its shape came to be."""
    blocks = derive_blocks(num_parameters, config)
    width = derive_width(num_parameters, blocks.value, config)
    items, services = derive_layers(blocks.value)
    heads = derive_heads(width.value, config.head_dim)
    mlp = Derivation(
        "mlp_ratio", config.mlp_ratio, "hidden width of an MLP over D", "Vaswani et al. 2017 (arXiv 1706.03762, 3.3)"
    )
    head = Derivation("head_ratio", config.head_ratio, "hidden width of the head over D", DECISION)
    derivations = (blocks, width, items, services, heads, mlp, head)
    shape = {"dim": width, "item_layers": items, "service_layers": services, "num_heads": heads}
    values = {name: derived.value for name, derived in shape.items()}
    ratios = {"mlp_ratio": config.mlp_ratio, "head_ratio": config.head_ratio}
    return ClueConfig.parse({**base.model_dump(), **ratios, **values}), derivations


def derive_blocks(num_parameters: float, config: LadderConfig) -> Derivation[int]:
    """Depth L, of both transformers together.

    Of the depths at which some width gives N to 10%, the one at which width over depth is nearest `aspect_ratio`; if
    there is none, the depth that comes nearest N.
    """

    def missed(blocks: int) -> tuple[bool, float]:
        width = derive_width(num_parameters, blocks, config).value
        deviation = abs(count(_plain(width, blocks, config)) / num_parameters - 1)
        if deviation > MAX_DEVIATION:
            return True, deviation
        return False, abs(math.log(width / blocks / config.aspect_ratio))

    deepest = max(2, math.ceil((num_parameters / config.mlp_ratio) ** (1 / 3)))  # wider than deep, at any aspect ratio
    blocks = min(range(2, deepest + 1), key=missed)
    width = derive_width(num_parameters, blocks, config).value
    return Derivation(
        "blocks L",
        blocks,
        f"D / L = {width / blocks:.3g}: nearest {config.aspect_ratio:g} of those with N to {MAX_DEVIATION:.0%}; >= 2",
        "LMRec (arXiv 2212.03760, table 9): 8 blocks of 256, 24 of 768; quality is flat around it, Kaplan et al. 2020 "
        "(arXiv 2001.08361, figure 5)",
    )


def derive_width(num_parameters: float, blocks: int, config: LadderConfig) -> Derivation[int]:
    """Width D: what is left of N per block and head, as they are quadratic in D but for vectors."""
    per_square = blocks * (4 + 2 * config.mlp_ratio) + 2 * config.head_ratio
    exact = math.sqrt(num_parameters / per_square)
    # Wide matrices are fastest in whole tiles of 64.
    grain = 8 if exact < 128 else 16 if exact < 512 else 64
    near = range(max(8, grain * (int(exact / grain) - 3)), int(exact) + 5 * grain, grain)
    width = min((width for width in near if _has_good_heads(width, config.head_dim)), key=lambda w: abs(w - exact))
    return Derivation(
        "width D",
        width,
        f"sqrt(N / (L (4 + 2 mlp_ratio) + 2 head_ratio)) = sqrt({num_parameters:,.0f} / {per_square}) = {exact:.1f}, "
        f"multiple of {grain} that divides into heads",
        "Kaplan et al. 2020 (arXiv 2001.08361, table 1): N without embeddings; multiples: " + DECISION,
    )


def derive_layers(blocks: int) -> tuple[Derivation[int], Derivation[int]]:
    """Blocks of the Item Transformer and of the Service Transformer: half and half, the odd one reads text."""
    items = (blocks + 1) // 2
    source = "the paper's readable sources name no split (CLUE, arXiv 2111.11294): " + DECISION
    return (
        Derivation("item_layers", items, f"ceil(L / 2) = ceil({blocks} / 2)", source),
        Derivation("service_layers", blocks - items, f"floor(L / 2) = floor({blocks} / 2)", source),
    )


def derive_heads(width: int, head_dim: int) -> Derivation[int]:
    """Heads: about `head_dim` wide, but 4 of them where that leaves fewer; a multiple of 8 wide each."""
    wanted = _wanted_heads(width, head_dim)
    # Kernels of half precision need heads in multiples of 8.
    divisors = [heads for heads in range(1, width // 8 + 1) if width // 8 % heads == 0]
    heads = min(divisors, key=lambda heads: abs(math.log(heads / wanted)))
    return Derivation(
        "num_heads",
        heads,
        f"divisor of D / 8 nearest max(4, D / {head_dim}), at most D / 8: {wanted:.3g}; {width // heads} wide each",
        "LMRec (arXiv 2212.03760, table 9): 4 heads up to 128, 64 a head at 512 and 768",
    )


def _wanted_heads(width: int, head_dim: int) -> float:
    return min(width / 8, max(4, width / head_dim))


def _has_good_heads(width: int, head_dim: int) -> bool:
    """Whether the width divides into about as many heads as are wanted: 88 would into one or eleven."""
    return abs(math.log2(derive_heads(width, head_dim).value / _wanted_heads(width, head_dim))) < 1


def derive_batch_size(num_parameters: float, rule: BatchRule) -> Derivation[int]:
    """Users of a global batch."""
    exact = rule.batch_size * (num_parameters / rule.reference_parameters) ** rule.exponent
    size = max(BATCH_MULTIPLE, BATCH_MULTIPLE * round(exact / BATCH_MULTIPLE))
    return Derivation(
        "global_batch_size B",
        size,
        f"{rule.batch_size} (N / {rule.reference_parameters:,.0f})^{rule.exponent:g} = {exact:.1f}, "
        f"multiple of {BATCH_MULTIPLE}",
        rule.measured_in or "LMRec (arXiv 2212.03760, table 9), first three sizes",
        not rule.measured_in,
    )


def derive_learning_rates(dim: int, batch_size: int, rule: RateRule) -> tuple[Derivation[float], Derivation[float]]:
    """Peak learning rates of matrices and of embeddings."""
    found = []
    for name, power in (("learning_rate", rule.matrices), ("embedding_learning_rate", rule.embeddings)):
        formula = (
            f"{power.value:g} (D / {rule.reference_dim})^{power.width_exponent:g} "
            f"(B / {rule.reference_batch_size})^{power.batch_exponent:g}"
        )
        source = "width: muP (arXiv 2203.03466, table 3); batch: square root for Adam (arXiv 2205.10287)"
        value = float(
            f"{rule.at(power, dim, batch_size):.4g}"
        )  # what is hashed must not depend on a machine's last bit
        found.append(Derivation(name, value, formula, rule.measured_in or source, not rule.measured_in))
    return found[0], found[1]


def derive_samples(num_parameters: float, batch_size: int, rule: DurationRule) -> Derivation[int]:
    """Samples of a run, a whole number of batches."""
    exact = rule.tokens_per_parameter * num_parameters / rule.tokens_per_sample
    steps = max(rule.min_steps, math.ceil(exact / batch_size))
    return Derivation(
        "samples",
        steps * batch_size,
        f"max({rule.tokens_per_parameter:g} N / {rule.tokens_per_sample:g} tokens a sample = {exact:,.0f}, "
        f"{rule.min_steps} B), in whole batches: {steps:,} steps",
        rule.measured_in or "Hoffmann et al. 2022 (arXiv 2203.15556, table 3), of language models",
        not rule.measured_in,
    )


def _plain(width: int, blocks: int, config: LadderConfig) -> ClueConfig:
    """Encoder with as many parameters, however blocks and heads are divided."""
    return ClueConfig(
        dim=width, item_layers=blocks, service_layers=0, mlp_ratio=config.mlp_ratio, head_ratio=config.head_ratio
    )
