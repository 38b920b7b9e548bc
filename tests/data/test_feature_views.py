"""What the views of an item mask and drop, and that who asks for them does not matter."""

import numpy as np
import pytest

from tests.support.two_tower import CONFIGS, INFORMATION, make_items
from userrep.data.feature_views import (
    AugmentationConfig,
    correlated_features,
    draw_items,
    draw_masks,
    draw_views,
    drop_features,
    drop_values,
)
from userrep.data.features import RaggedFeature

NUM_FEATURES = len(CONFIGS)
PLAIN = AugmentationConfig(value_dropout=0.0)


def masks_of(steps: int = 300, **changes: object) -> np.ndarray:
    config = AugmentationConfig.parse(changes)
    return np.stack([draw_masks(config, INFORMATION, seed=1, step=step) for step in range(steps)])


def test_correlated_features_are_the_seed_and_those_that_tell_most_about_it() -> None:
    assert np.flatnonzero(correlated_features(INFORMATION, 1)).tolist() == [0, 1, 2]
    assert np.flatnonzero(correlated_features(INFORMATION, 4)).tolist() == [0, 3, 4]
    equal = np.ones((4, 4))
    assert np.flatnonzero(correlated_features(equal, 3)).tolist() == [0, 1, 3]
    for size in (2, 3):  # the other view keeps a feature
        assert correlated_features(np.ones((size, size)), 0).sum() == size - 1


@pytest.mark.parametrize("masking", ["cfm", "rfm"])
def test_masks_are_complementary_or_independent(masking: str) -> None:
    first, second = masks_of(masking=masking).transpose(1, 0, 2)
    assert (first != second).all()
    first, second = masks_of(masking=masking, is_complementary=False).transpose(1, 0, 2)
    assert 0 < (first == second).all(axis=1).mean() < 0.5  # what is hidden from both, no view sees
    sizes = {"cfm": 3, "rfm": 2}
    assert (first.sum(axis=1) == sizes[masking]).all()
    assert (second.sum(axis=1) == sizes[masking]).all()


def test_correlated_masks_are_those_of_a_seed_feature_drawn_anew_every_step() -> None:
    firsts = masks_of(masking="cfm")[:, 0]
    sets = [correlated_features(INFORMATION, seed) for seed in range(NUM_FEATURES)]
    chosen = [sum((mask == of_seed).all() for of_seed in sets) for mask in firsts]
    assert min(chosen) >= 1
    assert len(np.unique(firsts, axis=0)) == len(np.unique(sets, axis=0))


def test_random_masks_take_every_half() -> None:
    firsts = masks_of(masking="rfm")[:, 0]
    assert len(np.unique(firsts, axis=0)) == 10  # 2 of 5
    assert not masks_of(masking="none").any()


def test_masking_needs_two_features() -> None:
    with pytest.raises(ValueError, match="with 1 feature"):
        draw_masks(PLAIN, np.zeros((1, 1)), 0, 0)


def test_masked_features_are_empty_and_the_others_untouched() -> None:
    items, rows = make_items(), np.array([3, 0, 3, 7])
    masks = draw_masks(PLAIN, INFORMATION, 5, 2)
    views = draw_views(items, rows, np.arange(4), INFORMATION, PLAIN, 5, 2)
    for mask, view in zip(masks, views, strict=True):
        for is_masked, feature, whole in zip(mask, view, items.features, strict=True):
            assert len(feature.offsets) == 5
            assert np.array_equal(feature.values, [] if is_masked else whole.take(rows).values)


def test_dropout_takes_values_of_multi_valued_features_alone_and_differs_between_views() -> None:
    items, rows = make_items(), np.tile(np.arange(30), 40)
    config = AugmentationConfig(masking="none", value_dropout=0.3)
    first, second = draw_views(items, rows, np.arange(len(rows)), INFORMATION, config, 5, 2)
    for vocabulary, whole, one, other in zip(items.vocabularies, items.features, first, second, strict=True):
        sizes = [len(part.values) for part in (whole.take(rows), one, other)]
        if vocabulary.config.kind in ("multi_hot", "bag"):
            assert sizes[1] / sizes[0] == pytest.approx(0.7, abs=0.03)
            assert not np.array_equal(one.offsets, other.offsets)
        else:
            assert sizes[0] == sizes[1] == sizes[2]


def test_parts_of_the_global_batch_see_what_the_whole_sees() -> None:
    items, config = make_items(), AugmentationConfig(value_dropout=0.5)
    rows = draw_items(len(items), 17, 1, 9)
    whole = draw_views(items, rows, np.arange(17), INFORMATION, config, 1, 9)
    for positions in (np.arange(0, 8), np.arange(8, 17)):
        part = draw_views(items, rows[positions], positions, INFORMATION, config, 1, 9)
        for view, of_whole in zip(part, whole, strict=True):
            for actual, feature in zip(view, of_whole, strict=True):
                assert np.array_equal(actual.values, feature.take(positions).values)
                assert np.array_equal(actual.offsets, feature.take(positions).offsets)


def test_items_are_drawn_uniformly_and_anew_every_step() -> None:
    draws = np.stack([draw_items(10, 500, 0, step) for step in range(20)])
    counts = np.bincount(draws.ravel(), minlength=10)
    assert len(counts) == 10
    assert (abs(counts - 1000) < 5 * np.sqrt(1000)).all()
    assert not np.array_equal(draws[0], draws[1])
    assert np.array_equal(draws[3], draw_items(10, 500, 0, 3))


def test_values_are_dropped_independently_of_their_neighbours() -> None:
    feature = RaggedFeature(np.tile([0, 1], 4000), np.arange(0, 8001, 2))
    kept = drop_values(feature, np.arange(4000), 0.5, 7)
    is_kept = [np.zeros(4000, dtype=bool), np.zeros(4000, dtype=bool)]
    for value in (0, 1):
        owners = np.repeat(np.arange(4000), np.diff(kept.offsets))
        is_kept[value][owners[kept.values == value]] = True
    assert abs(np.corrcoef(*is_kept)[0, 1]) < 0.06


def test_features_are_dropped_item_by_item() -> None:
    features = [RaggedFeature(np.arange(2000), np.arange(2001))] * 2
    keys = np.arange(2000, dtype=np.uint64)
    one, other = drop_features(features, keys, 0.25, 3)
    assert len(one.values) == pytest.approx(1500, abs=100)
    assert not np.array_equal(one.values, other.values)
    again = drop_features([feature.take(keys[::-1].astype(np.int64)) for feature in features], keys[::-1], 0.25, 3)
    assert np.array_equal(np.sort(again[0].values), one.values)
