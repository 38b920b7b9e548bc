"""Amazon reviews as UCSD distributes them: review and metadata JSON lines of 2014, 2018 and 2023.

Source: https://jmcauley.ucsd.edu/data/amazon (2014), https://nijianmo.github.io/amazon (2018),
https://amazon-reviews-2023.github.io (2023). Differs: an item of 2023 is its `parent_asin`, by which metadata is keyed.
"""

import ast
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from userrep.config import Config, ConfigError
from userrep.data.item_text import record_attributes, record_text
from userrep.data.sources.lines import spans
from userrep.data.sources.records import parts_of
from userrep.data.sources.source import Part, TableName
from userrep.data.sources.validate import Rules

_STEMS = ("reviews_{0}", "reviews_{0}_5", "{0}", "{0}_5")
REVIEW_NAMES = tuple(f"{stem}.{end}" for end in ("json", "jsonl") for stem in _STEMS)
METADATA_NAMES = ("meta_{0}.json", "meta_{0}.jsonl")


class AmazonSource(Config):
    """A folder with one review file and one metadata file per category; a category is a service of the same name.

    The year of a record shows in its keys. Metadata of 2014 are Python literals, not JSON: both are read.
    """

    kind: Literal["amazon"] = "amazon"
    path: Path
    # As in the file names, e.g. Beauty, Toys_and_Games
    categories: tuple[str, ...] = Field(min_length=1)
    # File name with {0} for the category, plain or .gz; None: the names that UCSD uses
    reviews: str | None = None
    metadata: str | None = None
    # Keys of a metadata record, alternatives by `|` (the names differ by year)
    text_columns: tuple[str, ...] = Field(
        default=("title", "brand|store", "categories|category|main_category"), min_length=1
    )
    keep_attributes: bool = False  # texts as attributes with keys (`data/item_text.py`), for models that read them

    def services(self) -> list[str]:
        """The categories, in the order given."""
        return list(self.categories)

    def parts(self, table: TableName) -> list[Part]:
        """Spans of every category's file; Amazon has no users table.

        Raises:
            ConfigError: a category has no file, or several.
        """
        if table == "users":
            return []
        found: list[Part] = []
        for category in self.categories:
            path = self._file(category, table)
            parse = (
                partial(_item, record_attributes if self.keep_attributes else record_text, self.text_columns)
                if table == "items"
                else partial(_event, category)
            )
            found += parts_of(spans(path, path.name), table, parse, Rules(self.categories, "s"), "utf-8")
        return found

    def _file(self, category: str, table: TableName) -> Path:
        option, known = ("metadata", METADATA_NAMES) if table == "items" else ("reviews", REVIEW_NAMES)
        pattern = getattr(self, option)
        names = [name.replace("{0}", category) for name in ((pattern,) if pattern else known)]
        candidates = [self.path / f"{name}{end}" for name in names for end in ("", ".gz")]
        present = [path for path in candidates if path.is_file()]
        if len(present) != 1:
            listed = ", ".join(path.name for path in present) if present else f"none of {', '.join(names)} (or .gz)"
            raise ConfigError(
                f"category {category!r} has in {self.path} {listed}: one file is needed; name it by `{option}`"
            )
        return present[0]


def _record(line: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an escape that Python does not know is kept as it stands
            record = ast.literal_eval(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def _item(
    to_text: Callable[[Mapping[str, Any], Sequence[str]], str], text_columns: tuple[str, ...], line: str
) -> Sequence[object]:
    record = _record(line)
    return record.get("parent_asin", record.get("asin")), to_text(record, text_columns)


def _event(category: str, line: str) -> Sequence[object]:
    record = _record(line)
    item_id = record.get("parent_asin", record.get("asin"))
    user_id = record.get("reviewerID", record.get("user_id"))
    if "timestamp" not in record:
        return user_id, item_id, category, record.get("unixReviewTime"), None, record.get("overall")
    # 2023 counts milliseconds. What is no number goes on as it is, to be rejected for it.
    time = record["timestamp"]
    seconds = time // 1000 if isinstance(time, int | float) and not isinstance(time, bool) else time
    return user_id, item_id, category, seconds, None, record.get("rating")
