from pathlib import Path

import pytest

from tests.data.sources.reading import read, write
from tests.support.shared_data import shared_data
from userrep.config import ConfigError
from userrep.data.sources.movielens import AGES, OCCUPATIONS, MovieLensSource
from userrep.data.sources.parquet import ParquetSource


@pytest.mark.parametrize("end", ["", ".gz"])
def test_1m(tmp_path: Path, end: str):
    movies = "1::Toy Story (1995)::Animation|Children's|Comedy\n73::Mis\xe9rables, Les (1995)::Drama\n"
    movies += "4::Short\n::None::Drama\n"
    write(tmp_path / f"movies.dat{end}", movies, "latin-1")
    write(
        tmp_path / f"ratings.dat{end}", "1::73::5::978300760\n1::1::x::978302109\n2::1::3::\n2::1::3\n6040::1::4::0\n"
    )
    users = "1::F::1::10::48067\n2::M::56::20::70072\n3::M::25::99::00000\n4::M::25\n"
    write(tmp_path / f"users.dat{end}", users)
    source = MovieLensSource(path=tmp_path)
    assert source.services() == ["rating"]

    good, faults = read(source, "items")
    assert [(row["item_id"], row["text"], row["line"]) for row in good] == [
        ("1", "Toy Story (1995) Animation Children's Comedy", 1),
        ("73", "Mis\xe9rables, Les (1995) Drama", 2),
    ]
    assert faults == [("movies.dat", 3, "broken_line"), ("movies.dat", 4, "missing_id")]

    good, faults = read(source, "events")
    assert [(row["user_id"], row["item_id"], row["service"], row["time"], row["value"]) for row in good] == [
        ("1", "73", "rating", 978300760, 5.0),
        ("6040", "1", "rating", 0, 4.0),
    ]
    assert faults == [
        ("ratings.dat", line, reason) for line, reason in ((2, "bad_value"), (3, "bad_time"), (4, "broken_line"))
    ]

    good, faults = read(source, "users")
    assert [(row["user_id"], dict(row["labels"])) for row in good] == [
        ("1", {"gender": "F", "age": "under 18", "occupation": "K-12 student"}),
        ("2", {"gender": "M", "age": "56+", "occupation": "writer"}),
        ("3", {"gender": "M", "age": "25-34", "occupation": "99"}),
    ]
    assert faults == [("users.dat", 4, "broken_line")]


def test_25m(tmp_path: Path):
    movies = "movieId,title,genres\n1,Toy Story (1995),Adventure|Animation\n"
    movies += '2,"Mis\xe9rables, Les (1995)",(no genres listed)\n3,"Bad\n'
    write(tmp_path / "movies.csv", movies.replace("\n", "\r\n"))
    write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5,1147880044\n1,2,3.5\n1,2,,1147880045\n")
    source = MovieLensSource(path=tmp_path)
    good, faults = read(source, "items")
    assert [(row["item_id"], row["text"], row["line"]) for row in good] == [
        ("1", "Toy Story (1995) Adventure Animation", 2),
        ("2", "Mis\xe9rables, Les (1995)", 3),
    ]
    assert faults == [("movies.csv", 4, "broken_line")]
    good, faults = read(source, "events")
    assert [(row["value"], row["time"], row["line"]) for row in good] == [(3.5, 1147880044, 2), (None, 1147880045, 4)]
    assert faults == [("ratings.csv", 3, "broken_line")]
    assert source.parts("users") == []


def test_folders_that_are_no_movielens(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"neither ratings\.dat nor ratings\.csv"):
        MovieLensSource(path=tmp_path).parts("events")
    write(tmp_path / "ratings.csv", "user,movie\n")
    with pytest.raises(ConfigError, match=r"begins with 'user,movie'"):
        MovieLensSource(path=tmp_path).parts("events")
    write(tmp_path / "ratings.dat", "")
    with pytest.raises(ConfigError, match=r"both ratings\.dat and ratings\.csv"):
        MovieLensSource(path=tmp_path).parts("events")
    with pytest.raises(ConfigError, match=r"no movies\.dat or movies\.dat\.gz"):
        MovieLensSource(path=tmp_path, layout="1m").parts("items")


def test_code_tables_are_those_of_the_set():
    """The names of the real set's labels, which another pipeline decoded."""
    rows, _ = read(ParquetSource(path=shared_data("ml1m_users1_2999")), "users")
    labels = [dict(row["labels"]) for row in rows]
    assert {row["age"] for row in labels} == set(AGES.values())
    assert {row["occupation"] for row in labels} == set(OCCUPATIONS)
    assert labels[0] == {"gender": "F", "age": AGES["1"], "occupation": OCCUPATIONS[10], "zip": "48067"}
