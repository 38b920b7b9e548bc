"""Two views of an item: some features masked, then some values of the multi-valued features dropped.

Source: Yao et al. 2021 (arXiv 2007.12865, section 3.2): random (RFM) and correlated feature masking (CFM), their
complementary masks, dropout of values.
Differs: the masked set of CFM has at most K - 1 features, so that either view keeps one; a feature that dropout leaves
without a value is seen as a masked one.

Everything is a function of (seed, step, purpose) and of an item's position in the global batch, whoever asks for it.

Legend: `K` features, `N` items, `V` values of a feature, `G` items of the global batch.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from userrep.config import Config
from userrep.data.feature_vocabulary import MULTI_VALUED
from userrep.data.features import ItemFeatures, RaggedFeature
from userrep.data.split import mix, unit_interval

Purpose = Literal["items", "masks", "first values", "second values", "supervised"]
PURPOSES: tuple[Purpose, ...] = ("items", "masks", "first values", "second values", "supervised")


class AugmentationConfig(Config):
    """How the two views of an item differ."""

    # cfm: a random feature and those that tell most about it are masked together. rfm: a random half of the features.
    masking: Literal["cfm", "rfm", "none"] = "cfm"
    is_complementary: bool = True  # one view sees what the other one does not; else two independent draws
    value_dropout: float = Field(default=0.3, ge=0, lt=1)  # probability of a value of a multi-hot feature or a bag


def draw_seed(seed: int, step: int, purpose: Purpose) -> int:
    """Seed of one kind of draws in a step; 64 bits, unrelated for any two triples."""
    sequence = np.random.SeedSequence([seed, step, PURPOSES.index(purpose)])
    return int(sequence.generate_state(1, np.uint64)[0])


def draw_items(num_items: int, size: int, seed: int, step: int) -> np.ndarray:
    """Rows of the global batch, uniform over the corpus with replacement, int64 (G,)."""
    return np.random.default_rng(draw_seed(seed, step, "items")).integers(num_items, size=size)


def draw_masks(config: AugmentationConfig, information_KK: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Features that each view masks, bool (2, K).

    Args:
        config: which masking.
        information_KK: mutual information of features; `rfm` reads nothing but its size.
        seed: of the run.
        step: of the run; every step draws anew.

    Raises:
        ValueError: masking with less than two features.
    """
    num_features = len(information_KK)
    if config.masking == "none":
        return np.zeros((2, num_features), dtype=bool)
    if num_features < 2:
        raise ValueError(
            f"masking {config.masking!r} with {num_features} feature: a view would be empty; give at least two "
            "features, or set masking to none"
        )
    rng = np.random.default_rng(draw_seed(seed, step, "masks"))
    first_K = _draw_mask(config, information_KK, rng)
    return np.stack([first_K, ~first_K if config.is_complementary else _draw_mask(config, information_KK, rng)])


def correlated_features(information_KK: np.ndarray, seed_feature: int) -> np.ndarray:
    """The seed feature and the floor(K / 2) that tell most about it, at most K - 1 in all; bool (K,).

    Of features that tell the same the earlier one comes first.
    """
    num_features = len(information_KK)
    others = np.delete(np.arange(num_features), seed_feature)
    ranked = others[np.argsort(-information_KK[seed_feature, others], kind="stable")]
    is_masked_K = np.zeros(num_features, dtype=bool)
    is_masked_K[[seed_feature, *ranked[: min(num_features // 2, num_features - 2)]]] = True
    return is_masked_K


def _draw_mask(config: AugmentationConfig, information_KK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    num_features = len(information_KK)
    if config.masking == "cfm":
        return correlated_features(information_KK, int(rng.integers(num_features)))
    is_masked_K = np.zeros(num_features, dtype=bool)
    is_masked_K[rng.permutation(num_features)[: num_features // 2]] = True
    return is_masked_K


def draw_views(
    items: ItemFeatures,
    rows_N: np.ndarray,
    positions_N: np.ndarray,
    information_KK: np.ndarray,
    config: AugmentationConfig,
    seed: int,
    step: int,
) -> tuple[tuple[RaggedFeature, ...], tuple[RaggedFeature, ...]]:
    """Features of some items as the two views see them.

    Args:
        items: of the corpus.
        rows_N: this worker's part of `draw_items`.
        positions_N: where each stands in the global batch; with seed and step they decide alone what is dropped.
        information_KK: as in `draw_masks`.
        config: how views differ.
        seed: of the run.
        step: of the run.
    """
    first_K, second_K = draw_masks(config, information_KK, seed, step)
    features = tuple(feature.take(rows_N) for feature in items.features)
    is_multi_K = [vocabulary.config.kind in MULTI_VALUED for vocabulary in items.vocabularies]
    draws: tuple[tuple[np.ndarray, Purpose], ...] = ((first_K, "first values"), (second_K, "second values"))
    views = []
    for is_masked_K, purpose in draws:
        luck_seed = draw_seed(seed, step, purpose)
        view = []
        for number, feature in enumerate(features):
            if is_masked_K[number]:
                view.append(RaggedFeature(feature.values[:0], np.zeros_like(feature.offsets)))
            elif is_multi_K[number] and config.value_dropout:
                view.append(drop_values(feature, positions_N, config.value_dropout, luck_seed + number))
            else:
                view.append(feature)
        views.append(tuple(view))
    return views[0], views[1]


def drop_values(feature: RaggedFeature, positions_N: np.ndarray, probability: float, seed: int) -> RaggedFeature:
    """Drops each value of each item with a probability.

    Args:
        feature: values of N items.
        positions_N: number of each item; with the seed it decides alone.
        probability: in [0, 1].
        seed: any.
    """
    lengths = np.diff(feature.offsets)
    place_V = np.arange(len(feature.values)) - np.repeat(feature.offsets[:-1], lengths)
    # Neighbours of a mixed key are the next numbers of a generator: unrelated once they are mixed in turn.
    keys_V = np.repeat(mix(positions_N.astype(np.uint64), seed), lengths) + place_V.astype(np.uint64)
    return feature.keep(unit_interval(keys_V, seed) >= probability)


def drop_features(
    features: Sequence[RaggedFeature], keys_N: np.ndarray, probability: float, seed: int
) -> tuple[RaggedFeature, ...]:
    """Masks each feature of each item with a probability.

    Args:
        features: K, of N items.
        keys_N: uint64; with the seed they decide alone.
        probability: in [0, 1].
        seed: any.
    """
    dropped = []
    for number, feature in enumerate(features):
        is_kept_N = unit_interval(keys_N, seed + number) >= probability
        dropped.append(feature.keep(np.repeat(is_kept_N, np.diff(feature.offsets))))
    return tuple(dropped)
