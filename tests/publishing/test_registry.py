"""Publishing: one version per table, whatever was interrupted; the alias moves last; versions do not change."""

import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.publishing.conftest import build_table
from userrep.manifest import IncompleteTableError
from userrep.publishing.client import pull, resolve
from userrep.publishing.connection import RegistryError
from userrep.publishing.registry import Published, move_alias, publish


def publish_table(table_dir: Path, name: str, uri: str, **changes) -> Published:
    return publish(table_dir, name, **{"alias": "champion", "tracking_uri": uri, "experiment": "tables", **changes})


def versions_of(client: MlflowClient, name: str) -> list[int]:
    return sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))


def test_a_version_carries_its_files_figures_and_origin(table_dir, name, sqlite_uri, fresh_client):
    done = publish_table(
        table_dir, name, sqlite_uri, metrics={"val/recall_at_10": 0.25, "val/ndcg_at_10": 0.125}, tags={"team": "a"}
    )
    model = fresh_client.get_logged_model(done.model_id)
    version = fresh_client.get_model_version_by_alias(name, "champion")
    run = fresh_client.get_run(version.run_id)
    assert done == Published(name, 1, "champion", model.model_id, version.tags["table_sha256"])
    assert model.status == "READY"
    assert model.params["encoder_digest"] == "e" * 12
    assert {metric.key: metric.value for metric in model.metrics} == {"val/recall_at_10": 0.25, "val/ndcg_at_10": 0.125}
    assert version.tags["team"] == "a"
    assert (run.info.status, run.data.metrics["val/recall_at_10"]) == ("FINISHED", 0.25)


def test_publishing_a_table_again_only_moves_the_alias(table_dir, name, sqlite_uri, fresh_client):
    first = publish_table(table_dir, name, sqlite_uri)
    again = publish_table(table_dir, name, sqlite_uri, alias="second")
    assert (again.version, again.model_id) == (first.version, first.model_id)
    assert versions_of(fresh_client, name) == [1]
    assert {key: int(number) for key, number in fresh_client.get_registered_model(name).aliases.items()} == {
        "champion": 1,
        "second": 1,
    }


def test_the_same_rows_built_on_another_day_are_the_same_table(table_dir, tmp_path, name, sqlite_uri):
    build_table(tmp_path / "later", created_at="2026-02-02T00:00:00+00:00")
    assert publish_table(table_dir, name, sqlite_uri).version == 1
    assert publish_table(tmp_path / "later", name, sqlite_uri).version == 1


def test_versions_are_immutable_and_an_alias_rolls_back(table_dir, tmp_path, name, sqlite_uri):
    new_rows = build_table(tmp_path / "new", seed=1)
    publish_table(table_dir, name, sqlite_uri)
    before = pull(f"{name}/1", tmp_path / "before", tracking_uri=sqlite_uri)
    assert publish_table(tmp_path / "new", name, sqlite_uri).version == 2
    assert pull(f"{name}@champion", tmp_path / "now", tracking_uri=sqlite_uri).dataset().to_table().num_rows == 40
    after = pull(f"{name}@v1", tmp_path / "after", tracking_uri=sqlite_uri)
    assert after.manifest == before.manifest
    assert after.dataset().to_table().equals(before.dataset().to_table())
    assert not after.dataset().to_table().sort_by("user_id").equals(new_rows)
    assert move_alias(name, "champion", 1, tracking_uri=sqlite_uri) == 2
    assert resolve(f"{name}@champion", tracking_uri=sqlite_uri).version == 1
    with pytest.raises(RegistryError, match="version=9"):
        move_alias(name, "champion", 9, tracking_uri=sqlite_uri)


STEPS = [
    "create_run",
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "log_metric",
    "create_registered_model",
    "create_model_version",
    "set_terminated",
    "set_registered_model_tag",
    "set_registered_model_alias",
]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_publish_keeps_the_old_table_and_a_rerun_completes(
    tmp_path, name, sqlite_uri, fresh_client, monkeypatch, step, moment
):
    is_first = step == "create_registered_model"  # it is called for the first version of a name only
    build_table(tmp_path / "new", seed=1)
    if not is_first:
        build_table(tmp_path / "old")
        publish_table(tmp_path / "old", name, sqlite_uri)
    real = getattr(MlflowClient, step)

    def fail(*arguments, **keywords):
        if moment == "after":
            real(*arguments, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, fail)
        with pytest.raises(KeyboardInterrupt):
            publish_table(tmp_path / "new", name, sqlite_uri, metrics={"val/mrr": 0.5})
    if not is_first and (step, moment) != ("set_registered_model_alias", "after"):
        assert resolve(f"{name}@champion", tracking_uri=sqlite_uri).version == 1

    done = publish_table(tmp_path / "new", name, sqlite_uri, metrics={"val/mrr": 0.5})
    expected = [1] if is_first else [1, 2]
    assert versions_of(fresh_client, name) == expected
    assert resolve(f"{name}@champion", tracking_uri=sqlite_uri).version == done.version == expected[-1]
    pulled = pull(f"{name}@champion", tmp_path / "pulled", tracking_uri=sqlite_uri)
    assert pulled.manifest.facts["table_sha256"] == done.table_sha256
    models = fresh_client.search_logged_models([fresh_client.get_experiment_by_name("tables").experiment_id])
    assert [model.status for model in models if model.name == name] == ["READY"] * len(expected)  # nothing left behind
    run_id = fresh_client.get_model_version(name, str(done.version)).run_id
    assert fresh_client.get_run(run_id).info.status == "FINISHED"
    assert [point.value for point in fresh_client.get_metric_history(run_id, "val/mrr")] == [0.5]
    assert [metric.value for metric in fresh_client.get_logged_model(done.model_id).metrics] == [0.5]


def test_a_damaged_table_is_not_published(table_dir, name, sqlite_uri, fresh_client):
    part = table_dir / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(IncompleteTableError, match="part-00000"):
        publish_table(table_dir, name, sqlite_uri)
    assert versions_of(fresh_client, name) == []


def test_a_run_of_the_caller_is_recorded_and_left_open(table_dir, tmp_path, name, sqlite_uri, fresh_client):
    experiment_id = fresh_client.create_experiment(name, artifact_location=(tmp_path / "files").as_uri())
    run_id = fresh_client.create_run(experiment_id).info.run_id
    with pytest.raises(RegistryError, match=f"belongs to experiment '{name}'"):
        publish_table(table_dir, name, sqlite_uri, run_id=run_id)
    publish_table(table_dir, name, sqlite_uri, run_id=run_id, experiment=name)
    assert fresh_client.get_model_version(name, "1").run_id == run_id
    assert fresh_client.get_run(run_id).info.status == "RUNNING"
    assert any((tmp_path / "files").rglob("part-00000.parquet"))


def test_files_go_to_the_artifact_root(table_dir, tmp_path, name, sqlite_uri):
    publish_table(table_dir, name, sqlite_uri, experiment=name, artifact_root=tmp_path / "root with space")
    assert any((tmp_path / "root with space").rglob("part-00000.parquet"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "table name 'a/b'"),
        ({"name": "a.b"}, "table name 'a.b'"),
        ({"alias": "latest"}, "alias 'latest'"),
        ({"alias": "V3"}, "alias 'V3'"),
        ({"alias": ""}, "alias ''"),
        ({"metrics": {"recall@10": 0.1}}, "'recall@10' = 0.1"),
        ({"metrics": {"loss": float("nan")}}, "'loss' = nan"),
        ({"tags": {"model_id": "x"}}, "tags model_id"),
        ({"tracking_uri": "sqlite:///relative.db"}, "depends on the working directory"),
        ({"tracking_uri": "./mlruns"}, "not supported"),
        ({"tracking_uri": "sqlite:////no/such/place/x.db"}, "there is no directory"),
    ],
)
def test_arguments_are_refused_before_anything_happens(table_dir, sqlite_uri, changes, message):
    arguments = {"name": "fine", "alias": "champion", "tracking_uri": sqlite_uri, "experiment": "tables", **changes}
    with pytest.raises(RegistryError, match=message):
        publish(table_dir, **arguments)


def test_a_name_of_another_kind_of_model_is_refused(table_dir, name, sqlite_uri, fresh_client):
    fresh_client.create_registered_model(name)
    with pytest.raises(RegistryError, match="holds no embedding tables"):
        publish_table(table_dir, name, sqlite_uri)


def test_publishing_prints_nothing_and_creates_nothing_here(table_dir, tmp_path, monkeypatch, capfd):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    uri = f"sqlite:///{tmp_path / 'own.db'}"
    publish_table(table_dir, "quiet", uri)
    sys.stdout.flush()
    assert capfd.readouterr() == ("", "")
    assert list((tmp_path / "here").iterdir()) == []
    assert (tmp_path / "mlartifacts").is_dir()
