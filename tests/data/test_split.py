import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userrep.config import ConfigError
from userrep.data.split import (
    SPLITS,
    SplitConfig,
    assign_buckets,
    assign_splits,
    id_keys,
    mix,
    unit_interval,
)

MASK = 2**64 - 1


def siphash_2_4(data: bytes, key: bytes) -> int:
    """SipHash-2-4 in plain Python.

    Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012, section 2 and test vectors of appendix A.
    """
    k0, k1 = (int.from_bytes(key[n : n + 8], "little") for n in (0, 8))
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotate(value: int, bits: int) -> int:
        return (value << bits | value >> (64 - bits)) & MASK

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0] = (v[0] + v[1]) & MASK
            v[1] = rotate(v[1], 13) ^ v[0]
            v[0] = rotate(v[0], 32)
            v[2] = (v[2] + v[3]) & MASK
            v[3] = rotate(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & MASK
            v[3] = rotate(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & MASK
            v[1] = rotate(v[1], 17) ^ v[2]
            v[2] = rotate(v[2], 32)

    padded = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) & 255])
    for start in range(0, len(padded), 8):
        word = int.from_bytes(padded[start : start + 8], "little")
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def redistribute(value: int) -> int:
    """What pandas.util.hash_array does last: the finaliser of splitmix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def test_the_reference_gives_the_published_vector():
    assert siphash_2_4(bytes(range(15)), bytes(range(16))) == 0xA129CA6149BE45E5


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=8))
def test_keys_are_siphash_of_the_id(ids: list[str]):
    expected = [redistribute(siphash_2_4(text.encode(), b"0123456789123456")) for text in ids]
    assert id_keys(pa.array(ids)).tolist() == expected
    assert id_keys(pa.chunked_array([ids[:1], ids[1:]], pa.string())).tolist() == expected


def test_no_ids_give_no_keys():
    assert id_keys(pa.array([], pa.string())).dtype == np.uint64
    assert assign_splits(np.zeros(0, np.uint64), SplitConfig()).shape == (0,)


@pytest.mark.parametrize(("validation", "test"), [(0.08, 0.08), (0.3, 0.1), (0, 0), (0, 1)])
def test_splits_have_their_share_and_move_with_the_seed(validation: float, test: float):
    keys = id_keys(pa.array([f"user-{n}" for n in range(20_000)]))
    splits = [assign_splits(keys, SplitConfig(validation=validation, test=test, seed=seed)) for seed in (0, 1)]
    share = {"train": 1 - validation - test, "validation": validation, "test": test}
    for split in splits:
        for index, name in enumerate(SPLITS):
            deviation = (share[name] * (1 - share[name]) / len(keys)) ** 0.5
            assert abs((split == index).mean() - share[name]) <= 6 * deviation
    # Independent splits agree as often as two independent draws do.
    expected = sum(part**2 for part in share.values())
    assert abs((splits[0] == splits[1]).mean() - expected) <= 6 * (expected * (1 - expected) / len(keys)) ** 0.5 + 1e-12


def test_splits_do_not_follow_the_shards():
    keys = id_keys(pa.array([f"user-{n}" for n in range(20_000)]))
    held_out = assign_splits(keys, SplitConfig(validation=0, test=0.5)) == 2
    for num_buckets in (2, 16):
        buckets = assign_buckets(keys, num_buckets)
        for bucket in range(num_buckets):
            mine = held_out[buckets == bucket]
            assert abs(len(mine) / len(keys) - 1 / num_buckets) < 6 * (1 / num_buckets / len(keys)) ** 0.5
            assert abs(mine.mean() - 0.5) < 6 * 0.5 / len(mine) ** 0.5


def test_mix_is_a_bijection_into_the_unit_interval():
    keys = np.array([0, 1, 2**63, MASK, MASK - 1], np.uint64)
    for seed in (0, 1, 2**40):
        assert len(set(mix(keys, seed).tolist())) == len(keys)
        assert ((unit_interval(keys, seed) >= 0) & (unit_interval(keys, seed) <= 1)).all()


@pytest.mark.parametrize("values", [{"test": -0.1}, {"validation": 1.1}, {"validation": 0.6, "test": 0.5}])
def test_shares_that_are_none_are_refused(values: dict[str, float]):
    with pytest.raises(ConfigError, match=next(iter(values))):
        SplitConfig.parse(values)
