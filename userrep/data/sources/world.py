"""The made-up world behind the synthetic source: topics, words, items and users' drifting interests.

The model, exactly. A topic t has a unit vector v_t in R^D; topics of one department lie near each other. A user's
interest in period k is z_k in R^D: z_0 ~ N(0, I), z_{k+1} = r z_k + sqrt(1 - r^2) e_k with r = 1 - drift: a stationary
random walk. An item i of service s belongs to one topic t(i) and has popularity w_{s,t(i)} / rank(i)^a, normalised over
the ranks of its topic. Then, with `sharpness` b,

    p(item i | user, period k, service s) = softmax over i of (b z_k . v_{t(i)} + log popularity_i).

Popularities within a topic sum to w_{s,t}, so this is the same as drawing a topic from softmax_t(b z_k . v_t + log
w_{s,t}) and then an item of it by popularity; that is how it is drawn and scored. Everything follows from the seed.

Shapes: `U` users of a chunk, `K` periods, `D` interest_dim, `S` services, `T` topics.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from userrep.config import Config

SERVICES = ("search", "shop")
CHUNK_USERS = 2048  # users drawn together; part of the definition of the data: another value draws other data
CHUNK_ITEMS = 16_384
NUM_LABEL_DIRECTIONS = 6  # one for gender, one for age, four for life stage
NOUNS, BRANDS, ADJECTIVES = 24, 12, 24  # words of a topic
_ONSETS, _VOWELS, _CODAS = "bdfgklmnprstvzhj", "aeiou", ("", "n", "r")

Stream = Literal["topics", "words", "items", "interests", "labels", "counts", "events"]
_STREAMS: tuple[Stream, ...] = ("topics", "words", "items", "interests", "labels", "counts", "events")


class WorldConfig(Config):
    """What is the same for every user of a synthetic world."""

    seed: int = Field(default=0, ge=0)
    num_items: int = Field(default=20_000, ge=1)  # per service
    num_topics: int = Field(default=64, ge=1, le=4096)
    num_departments: int = Field(default=8, ge=1)  # groups of related topics, which share a word
    interest_dim: int = Field(default=8, ge=NUM_LABEL_DIRECTIONS, le=64)
    # 0: no user has any taste. At the defaults the oracle finds a user's shop history among 1,000 at recall@10 of .93.
    sharpness: float = Field(default=1.2, ge=0)
    drift: float = Field(default=0.04, ge=0, le=1)  # 1 - correlation of an interest in one period and the next
    num_periods: int = Field(default=12, ge=1, le=120)
    period_days: int = Field(default=30, ge=1)
    popularity_exponent: float = Field(default=1.0, ge=0)  # Zipf's a, within a topic
    topic_popularity_exponent: float = Field(default=0.5, ge=0)  # Zipf's a of the topics themselves

    @model_validator(mode="after")
    def _items_for_every_topic(self) -> Self:
        if self.num_items < self.num_topics:
            raise ValueError(f"num_items {self.num_items} < num_topics {self.num_topics}: a topic needs an item")
        return self


@dataclass(frozen=True)
class World:
    """The topics and words of one seed. Its size depends on neither users nor events."""

    config: WorldConfig
    topic_vectors: np.ndarray  # (D, T), unit columns
    topic_log_weights: np.ndarray  # (S, T): log w, normalised over topics
    topic_starts: np.ndarray  # (T + 1,): items of topic t are starts[t] .. starts[t + 1] - 1, most popular first
    popularity_cumsum: np.ndarray  # (largest topic,): sums of 1 / rank^a
    label_directions: np.ndarray  # (D, 6), orthonormal columns
    department_of_topic: np.ndarray  # (T,)
    department_words: np.ndarray  # (departments,)
    topic_words: np.ndarray  # (T,)
    nouns: np.ndarray  # (T, NOUNS); brands and adjectives alike
    brands: np.ndarray
    adjectives: np.ndarray

    def interests(self, chunk: int) -> np.ndarray:
        """Interests (U, K, D) of the users `chunk * CHUNK_USERS ...`, always of a whole chunk."""
        rng = generator(self.config.seed, "interests", chunk)
        kept = 1 - self.config.drift
        steps = rng.standard_normal((CHUNK_USERS, self.config.num_periods, self.config.interest_dim))
        steps[:, 1:] *= np.sqrt(1 - kept**2)
        for period in range(1, self.config.num_periods):
            steps[:, period] += kept * steps[:, period - 1]
        return steps

    def topic_log_probs(self, interests: np.ndarray, service: int) -> np.ndarray:
        """log p(topic | interest, service), (..., T), of interests (..., D)."""
        logits = self.config.sharpness * (interests @ self.topic_vectors) + self.topic_log_weights[service]
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def item_log_shares(self, items: np.ndarray) -> np.ndarray:
        """log p(item | its topic) of item numbers."""
        topics = self.topics_of(items)
        sizes = np.diff(self.topic_starts)[topics]
        rank = items - self.topic_starts[topics] + 1
        return -self.config.popularity_exponent * np.log(rank) - np.log(self.popularity_cumsum[sizes - 1])

    def topics_of(self, items: np.ndarray) -> np.ndarray:
        """Topics of item numbers, the same for both services."""
        return np.searchsorted(self.topic_starts, items, side="right") - 1

    def draw_items(self, topics: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Item numbers by popularity within each topic, from uniform numbers in [0, 1)."""
        sizes = np.diff(self.topic_starts)[topics]
        ranks = np.searchsorted(self.popularity_cumsum, uniform * self.popularity_cumsum[sizes - 1], side="right")
        return self.topic_starts[topics] + np.minimum(ranks, sizes - 1)

    def item_texts(self, service: int, chunk: int) -> list[str]:
        """Texts of the items `chunk * CHUNK_ITEMS ...` of a service.

        A search item is a query of one to three words (brand, adjective, noun); a shop item is a product: brand, two
        adjectives, noun, department, category. Words are drawn from those of the item's topic with Zipf weights.
        """
        rng = generator(self.config.seed, "items", chunk * len(SERVICES) + service)
        items = np.arange(chunk * CHUNK_ITEMS, (chunk + 1) * CHUNK_ITEMS)
        topics = np.minimum(self.topics_of(items), self.config.num_topics - 1)  # beyond the last item: cut off below
        noun = self.nouns[topics, _zipf_ranks(rng, NOUNS)]
        brand = self.brands[topics, _zipf_ranks(rng, BRANDS)]
        first, second = (self.adjectives[topics, _zipf_ranks(rng, ADJECTIVES)] for _ in range(2))
        shape = rng.random(CHUNK_ITEMS)
        kept = min(CHUNK_ITEMS, self.config.num_items - chunk * CHUNK_ITEMS)
        if SERVICES[service] == "search":
            has_brand = (shape < 0.5).tolist()
            has_adjective = ((shape < 0.2) | (shape > 0.6)).tolist()
            rows = zip(brand, has_brand, first, has_adjective, noun, strict=True)
            texts = [f"{f'{b} ' if hb else ''}{f'{a} ' if ha else ''}{n}" for b, hb, a, ha, n in rows]
        else:
            department = self.department_words[self.department_of_topic[topics]]
            rows = zip(brand, first, second, noun, department, self.topic_words[topics], strict=True)
            texts = [" ".join(row) for row in rows]
        return texts[:kept]


def generator(seed: int, stream: Stream, chunk: int = 0) -> np.random.Generator:
    """Random numbers of one purpose and chunk, independent of all others."""
    return np.random.default_rng([seed, _STREAMS.index(stream), chunk])


def build_world(config: WorldConfig) -> World:
    """The world of a config, or of a source that is one; the last few are kept, since every part asks for the same."""
    return _build(config.model_dump_json(include=set(WorldConfig.model_fields)))


@lru_cache(maxsize=4)
def _build(config_json: str) -> World:
    config = WorldConfig.model_validate_json(config_json)
    rng = generator(config.seed, "topics")
    topics, departments = config.num_topics, min(config.num_departments, config.num_topics)
    department_of_topic = np.arange(topics) % departments
    # Half of a topic's direction is its department's: related topics attract the same users.
    vectors = rng.standard_normal((departments, config.interest_dim))[department_of_topic]
    vectors = vectors + rng.standard_normal((topics, config.interest_dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    zipf = np.arange(1, topics + 1) ** -config.topic_popularity_exponent
    weights = np.stack([rng.permutation(zipf) for _ in SERVICES])
    sizes = config.num_items // topics + (np.arange(topics) < config.num_items % topics)
    directions, _ = np.linalg.qr(rng.standard_normal((config.interest_dim, NUM_LABEL_DIRECTIONS)))
    words = _words(generator(config.seed, "words"), departments + topics * (1 + NOUNS + BRANDS + ADJECTIVES))
    cuts = np.cumsum([departments, topics, topics * NOUNS, topics * BRANDS])
    department_words, topic_words, nouns, brands, adjectives = np.split(words, cuts)
    return World(
        config=config,
        topic_vectors=vectors.T.copy(),
        topic_log_weights=np.log(weights / weights.sum(axis=1, keepdims=True)),
        topic_starts=np.concatenate([[0], np.cumsum(sizes)]),
        popularity_cumsum=np.cumsum(np.arange(1, sizes.max() + 1) ** -config.popularity_exponent),
        label_directions=directions,
        department_of_topic=department_of_topic,
        department_words=department_words,
        topic_words=topic_words,
        nouns=nouns.reshape(topics, NOUNS),
        brands=brands.reshape(topics, BRANDS),
        adjectives=adjectives.reshape(topics, ADJECTIVES),
    )


def _words(rng: np.random.Generator, count: int) -> np.ndarray:
    """Distinct pronounceable words. Syllables begin with a consonant, so no two sequences of them read the same."""
    syllables = [onset + vowel + coda for onset in _ONSETS for vowel in _VOWELS for coda in _CODAS]
    length = 2
    while len(syllables) ** length < 4 * count:
        length += 1
    codes = rng.choice(len(syllables) ** length, count, replace=False)
    table = np.array(syllables, object)
    words = table[codes % len(syllables)]
    for _ in range(length - 1):
        codes = codes // len(syllables)
        words = words + table[codes % len(syllables)]
    return words


def _zipf_ranks(rng: np.random.Generator, size: int) -> np.ndarray:
    """Ranks 0 .. size - 1 for each item of a chunk, with weights 1 / (rank + 1)."""
    cumulative = np.cumsum(1 / np.arange(1, size + 1))
    return np.searchsorted(cumulative, rng.random(CHUNK_ITEMS) * cumulative[-1], side="right")
