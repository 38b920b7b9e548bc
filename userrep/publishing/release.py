"""Releases a table: compares it with the version in use, asks the gate, adds the map to that version, and publishes.

Needs numpy: `pip install 'userrep[tables]'`. Without it, `registry.publish` makes a version that has neither.
"""

import getpass
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from userrep.manifest import Manifest, sha256_file
from userrep.publishing.alignment import MAP_NAME, write_maps
from userrep.publishing.client import opened
from userrep.publishing.comparison import Comparison, compare
from userrep.publishing.connection import WRITE_LIMITS, UnknownTableError, connect
from userrep.publishing.gate import GateConfig, GateRefusedError, GateReport, Quality, judge
from userrep.publishing.registry import Published, move_alias, publish
from userrep.publishing.upload import FILES_TAG, FORCED_TAG, PREVIOUS_TAG, REPORT_NAME, UNMAPPED_TAG, Beside
from userrep.publishing.verify import table_manifest, verify_table
from userrep.publishing.versions import TableVersion, list_versions

EVALUATED_FACT = "num_evaluated"  # users that the metrics of a table are means over


@dataclass(frozen=True)
class Release:
    """A released version, and what the gate found; None where there was nothing to compare with."""

    published: Published
    report: GateReport | None


@dataclass(frozen=True)
class Promotion:
    """A moved alias: the version that it pointed to before, and what the gate found; None where it did not exist."""

    before: int | None
    report: GateReport | None


def release(
    table_dir: Path,
    name: str,
    alias: str,
    *,
    tracking_uri: str,
    experiment: str,
    gate: GateConfig | None = None,
    run_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
    artifact_root: Path | None = None,
    scratch: Path | None = None,
    verbose: bool = False,
) -> Release:
    """Publishes a table through the gate; arguments as those of `registry.publish`.

    The version that the alias points to is the one before; where the alias is new, the newest version is, and the gate
    is not asked. What a release adds lies beside the version: the rotation into the space of the one before, and the
    gate's report.

    Args:
        table_dir: a committed table.
        name: of the table.
        alias: that moves.
        tracking_uri: address of the MLflow server, or an absolute database URI.
        experiment: name of the experiment.
        gate: its bounds; None for the defaults.
        run_id: run that made the table.
        metrics: figures of this table; the gate asks for some of them.
        tags: added to the version.
        artifact_root: where a new experiment in a local database keeps its files.
        scratch: where the version before is pulled to where it does not lie on this machine.
        verbose: let MLflow log and print.

    Raises:
        GateRefusedError: the table is worse than the version in use; nothing was published.
        IncompleteTableError: a table is damaged.
        RegistryError: as `registry.publish`.
    """
    gate = gate or GateConfig()
    manifest = verify_table(Path(table_dir))
    versions = _versions(name, tracking_uri, verbose)
    current = next((version for version in versions if alias in version.aliases), None)
    previous = current or (versions[-1] if versions else None)
    report, beside = None, None
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        if previous is not None and previous.table_sha256 != manifest.facts["table_sha256"]:
            with opened(previous, tracking_uri=tracking_uri, scratch=scratch, verbose=verbose) as old_dir:
                comparison = _compared(old_dir, Path(table_dir), gate)
                if current is not None:
                    new = Quality(metrics or {}, manifest.facts.get(EVALUATED_FACT), Path(table_dir))
                    old = _quality(current, old_dir, tracking_uri, verbose)
                    report = judge(comparison, old, new, gate, current.version)
                    check_gate(report, gate, f"{name}@{alias}")
            beside = _beside(Path(folder), comparison, previous, manifest, report, alias)
        published = publish(
            table_dir,
            name,
            alias,
            tracking_uri=tracking_uri,
            experiment=experiment,
            run_id=run_id,
            metrics=metrics,
            tags=tags,
            artifact_root=artifact_root,
            beside=beside,
            verbose=verbose,
        )
    return Release(published, report)


def promote(
    version: TableVersion,
    alias: str,
    *,
    tracking_uri: str,
    gate: GateConfig | None = None,
    scratch: Path | None = None,
    verbose: bool = False,
) -> Promotion:
    """Points an alias to a version through the gate, which compares it with the version that the alias points to now.

    Args:
        version: from `resolve`.
        alias: that moves; a new one is made, ungated.
        tracking_uri: address of the MLflow server, or an absolute database URI.
        gate: its bounds; None for the defaults.
        scratch: as in `release`.
        verbose: let MLflow log.

    Raises:
        GateRefusedError: the alias is where it was.
        RegistryError: likewise.
    """
    gate, report = gate or GateConfig(), None
    versions = _versions(version.name, tracking_uri, verbose)
    current = next((one for one in versions if alias in one.aliases), None)
    if current is not None and current.version != version.version:
        with (
            opened(current, tracking_uri=tracking_uri, scratch=scratch, verbose=verbose) as old_dir,
            opened(version, tracking_uri=tracking_uri, scratch=scratch, verbose=verbose) as new_dir,
        ):
            old, new = (
                _quality(one, directory, tracking_uri, verbose)
                for one, directory in ((current, old_dir), (version, new_dir))
            )
            report = judge(_compared(old_dir, new_dir, gate), old, new, gate, current.version)
        check_gate(report, gate, f"{version.name}@{alias}")
        if report.failures:
            with connect(tracking_uri, limits=WRITE_LIMITS, verbose=verbose) as client:
                client.set_model_version_tag(version.name, str(version.version), FORCED_TAG + alias, _override(report))
    before = move_alias(version.name, alias, version.version, tracking_uri=tracking_uri, verbose=verbose)
    return Promotion(before, report)


def check_gate(report: GateReport, gate: GateConfig, what: str) -> None:
    """Refuses a release that failed a check, unless it is forced.

    Raises:
        GateRefusedError: names every check that failed.
    """
    if report.failures and not gate.force:
        lines = [f"  {check.what}: {check.detail}" for check in report.failures]
        raise GateRefusedError(
            "\n".join([f"{what} stays at version {report.against}; the new one is worse:", *lines])
            + "\nRelease it all the same with --force (`userrep tables promote`) or --set publish.gate.force=true "
            "(`userrep publish`), which is recorded, or set other bounds: --set publish.gate.BOUND=VALUE"
        )


def _versions(name: str, tracking_uri: str, verbose: bool) -> list[TableVersion]:
    with connect(tracking_uri, create=True, verbose=verbose):
        pass  # the first release into a local database makes it
    try:
        return list_versions(name, tracking_uri=tracking_uri, verbose=verbose)
    except UnknownTableError:
        return []


def _compared(old: Path, new: Path, gate: GateConfig) -> Comparison:
    return compare(old, new, sample=gate.sample, neighbours=gate.neighbours, seed=gate.seed)


def _quality(version: TableVersion, directory: Path, tracking_uri: str, verbose: bool) -> Quality:
    """What is known of the quality of a published version: metrics of its LoggedModel, and the table's own facts."""
    with connect(tracking_uri, verbose=verbose) as client:
        found = client.get_logged_model(version.model_id).metrics or []
    users = table_manifest(directory).facts.get(EVALUATED_FACT)
    return Quality({metric.key: metric.value for metric in found}, users, directory)


def _beside(
    folder: Path,
    comparison: Comparison,
    previous: TableVersion,
    manifest: Manifest,
    report: GateReport | None,
    alias: str,
) -> Beside:
    """What the release adds to the version: the map to the one before, and the report, both vouched for by tags."""
    tags, files = {PREVIOUS_TAG: str(previous.version)}, dict[str, str]()
    if comparison.maps:
        facts = {
            "from_table_sha256": manifest.facts["table_sha256"],
            "to_table_sha256": previous.table_sha256,
            "to_version": previous.version,
        }
        files[MAP_NAME] = write_maps(folder / MAP_NAME, comparison.maps, facts)
    else:
        tags[UNMAPPED_TAG] = comparison.unmapped
    (folder / REPORT_NAME).write_text((report or GateReport(previous.version, (), comparison.drift())).text())
    files[REPORT_NAME] = sha256_file(folder / REPORT_NAME)
    if report is not None and report.failures:
        tags[FORCED_TAG + alias] = _override(report)
    return Beside(folder, {**tags, FILES_TAG: json.dumps(files, sort_keys=True)})


def _override(report: GateReport) -> str:
    """Who has overridden what, as the value of a tag."""
    record = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": getpass.getuser(),
        "against": report.against,
        "overridden": {check.what: check.detail for check in report.failures},
    }
    return json.dumps(record)[:5000]
