"""What is drawn of training histories, and how they and items are read."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.ingested import draw_shards
from tests.support.tokenized import item_tokens, write_shards
from userrep.data.leave_one_out import LeaveOneOut, load_leave_one_out
from userrep.data.next_item_samples import NextItemSamples, SequenceReader, draw_samples, trainable_users

CLS = 5000


@pytest.fixture
def data(tmp_path: Path) -> LeaveOneOut:
    return load_leave_one_out(tmp_path, write_shards(tmp_path, draw_shards(1)))


def histories_of(samples: NextItemSamples) -> list[list[int]]:
    return [part.tolist() for part in np.split(samples.histories.items, samples.histories.offsets[1:-1])]


def test_a_sample_is_a_place_of_the_training_history_with_what_is_before_it(data: LeaveOneOut) -> None:
    users = trainable_users(data, 1.0, 0)
    train = [part.tolist() for part in np.split(data.train.items, data.train.offsets[1:-1])]
    assert [user for user, history in enumerate(train) if len(history) >= 2] == users.tolist()
    allowed = [(train[user][:place], train[user][place]) for user in users for place in range(1, len(train[user]))]
    seen = []
    for number in range(60):
        samples = draw_samples(data, users, 3, 1, number)
        assert len(samples) == len(users)
        seen += list(zip(histories_of(samples), samples.targets.tolist(), strict=True))
    assert all(pair in allowed for pair in seen)
    assert all(pair in seen for pair in allowed)


def test_passes_differ_and_repeat_for_their_seed(data: LeaveOneOut) -> None:
    users = trainable_users(data, 1.0, 0)
    draws = [(3, 1, 0), (3, 1, 0), (4, 1, 0), (3, 2, 0), (3, 1, 1)]
    first, again, *others = (histories_of(draw_samples(data, users, *draw)) for draw in draws)
    assert first == again
    assert all(first != other for other in others)


def test_what_is_drawn_of_a_user_does_not_depend_on_the_other_users(data: LeaveOneOut) -> None:
    users = trainable_users(data, 1.0, 0)
    every = draw_samples(data, users, 3, 1, 0)
    some = draw_samples(data, users[::3], 3, 1, 0)
    rows = list(zip(histories_of(every), every.targets.tolist(), strict=True))
    assert [row for row in zip(histories_of(some), some.targets.tolist(), strict=True) if row not in rows] == []


def test_shares_are_nested_and_one_of_none_is_refused(data: LeaveOneOut) -> None:
    shares = [set(trainable_users(data, share, 7).tolist()) for share in (0.3, 0.6, 1.0)]
    assert shares[0] < shares[1] < shares[2]
    counts = np.where(data.train.lengths >= 2, 2, 0)
    unlucky = next(seed for seed in range(100) if not counts[data.train_share(0.01, seed)].any())
    with pytest.raises(ValueError, match="larger share"):
        trainable_users(data, 0.01, unlucky)


def test_batches_hold_all_samples_in_order(data: LeaveOneOut) -> None:
    samples = draw_samples(data, trainable_users(data, 1.0, 0), 0, 1, 0)
    batches = list(samples.batches(4))
    assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)
    assert [row for batch in batches for row in histories_of(batch)] == histories_of(samples)
    assert np.concatenate([batch.targets for batch in batches]).tolist() == samples.targets.tolist()


def test_sequences_are_the_recent_items_from_the_last_to_the_first(data: LeaveOneOut) -> None:
    reader = SequenceReader(data, CLS, max_items=3, max_tokens=9)
    names = data.item_ids.to_pylist()
    histories = data.histories("test")
    sequences = reader.histories(histories)
    parts = np.split(sequences.tokens, sequences.offsets[1:-1])
    for part, history in zip(parts, np.split(histories.items, histories.offsets[1:-1]), strict=True):
        tokens = [token for item in history[::-1][:3] for token in item_tokens(names[item])]
        assert part.tolist() == [CLS, *tokens][:9]
    items = reader.items(2, 5)
    for part, item in zip(np.split(items.tokens, items.offsets[1:-1]), range(2, 5), strict=True):
        assert part.tolist() == [CLS, *item_tokens(names[item])]
