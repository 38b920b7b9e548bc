"""MovieLens as GroupLens distributes it: the 1M `.dat` files and the `.csv` layout of 20M, 25M, 32M and latest.

Source: https://grouplens.org/datasets/movielens/ (layouts and code tables in each set's README). Differs: none.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from userrep.config import Config, ConfigError
from userrep.data.item_text import item_text
from userrep.data.sources.lines import Encoding, data_file, first_line, spans
from userrep.data.sources.records import parts_of, split_csv
from userrep.data.sources.source import Part, TableName
from userrep.data.sources.validate import Rules

SERVICE = "rating"
AGES = {"1": "under 18", "18": "18-24", "25": "25-34", "35": "35-44", "45": "45-49", "50": "50-55", "56": "56+"}
OCCUPATIONS = (
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)
_HEADERS = {"movies.csv": "movieId,title,genres", "ratings.csv": "userId,movieId,rating,timestamp"}
_NO_GENRES = "(no genres listed)"


class MovieLensSource(Config):
    """A folder as it comes out of the archive (each file may be gzipped).

    Items: title and genres. Events: ratings, service `rating`. Users, in 1M only: gender (F, M), age band, occupation.
    """

    kind: Literal["movielens"] = "movielens"
    path: Path
    layout: Literal["auto", "1m", "25m"] = "auto"  # auto: whichever ratings file is there

    def services(self) -> list[str]:
        """The one service, `rating`."""
        return [SERVICE]

    def parts(self, table: TableName) -> list[Part]:
        """Spans of the table's file; no users in the 25M layout.

        Raises:
            ConfigError: a file is missing or its header is not that of the layout.
        """
        rules = Rules((SERVICE,), "s")
        if self._is_1m():
            name = {"items": "movies.dat", "events": "ratings.dat", "users": "users.dat"}[table]
            parse = {"items": _item_1m, "events": partial(_event, _split_1m), "users": _user_1m}[table]
            return parts_of(spans(self._file(name), name), table, parse, rules, "latin-1")
        if table == "users":
            return []
        name = "movies.csv" if table == "items" else "ratings.csv"
        path = self._file(name)
        encoding: Encoding = "utf-8"
        header = first_line(path, encoding)
        if header != _HEADERS[name]:
            raise ConfigError(f"{path} begins with {header!r}, not with {_HEADERS[name]!r}: it is no MovieLens {name}")
        parse = _item_25m if table == "items" else partial(_event, _split_25m)
        return parts_of(spans(path, path.name), table, parse, rules, encoding, has_header=True)

    def _is_1m(self) -> bool:
        if self.layout != "auto":
            return self.layout == "1m"
        has_1m, has_25m = (data_file(self.path, name) is not None for name in ("ratings.dat", "ratings.csv"))
        if has_1m == has_25m:
            found = "both ratings.dat and ratings.csv" if has_1m else "neither ratings.dat nor ratings.csv"
            raise ConfigError(f"{self.path} holds {found}: give the folder of one MovieLens set, or set `layout`")
        return has_1m

    def _file(self, name: str) -> Path:
        path = data_file(self.path, name)
        if path is None:
            raise ConfigError(
                f"no {name} or {name}.gz in {self.path}: give the folder of an unpacked MovieLens archive"
            )
        return path


def _split_1m(line: str, num_fields: int) -> list[str]:
    fields = line.split("::")
    if len(fields) != num_fields:
        raise ValueError(f"{len(fields)} fields instead of {num_fields}")
    return fields


def _split_25m(line: str, num_fields: int) -> list[str]:
    return split_csv(line, ",", num_fields)


def _event(split: Callable[[str, int], list[str]], line: str) -> Sequence[object]:
    user_id, item_id, value, time = split(line, 4)
    return user_id, item_id, SERVICE, time, None, value


def _item_1m(line: str) -> Sequence[object]:
    return _item(_split_1m(line, 3))


def _item_25m(line: str) -> Sequence[object]:
    return _item(_split_25m(line, 3))


def _item(fields: list[str]) -> Sequence[object]:
    item_id, title, genres = fields
    return item_id, item_text((title, None if genres == _NO_GENRES else genres.split("|")))


def _user_1m(line: str) -> Sequence[object]:
    """Codes become the words of the set's README; a code that is not in it stays as it is."""
    user_id, gender, age, occupation, _ = _split_1m(line, 5)
    is_known = occupation.isdecimal() and int(occupation) < len(OCCUPATIONS)
    words = OCCUPATIONS[int(occupation)] if is_known else occupation
    return user_id, {"gender": gender, "age": AGES.get(age, age), "occupation": words}
