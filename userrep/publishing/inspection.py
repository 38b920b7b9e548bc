"""What a published version says of itself, without its vectors."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from userrep.manifest import MANIFEST_NAME, IncompleteTableError, sha256_file
from userrep.publishing.card import CARD_NAME
from userrep.publishing.client import TableMismatchError, fetch_file
from userrep.publishing.connection import TRANSFER_LIMITS, connect
from userrep.publishing.upload import BESIDE, FILES_TAG, FORCED_TAG, REPORT_NAME
from userrep.publishing.verify import table_manifest
from userrep.publishing.versions import TableVersion


@dataclass(frozen=True)
class Inspection:
    """Texts of a version, each as it was published; those that it has not are empty.

    Attributes:
        card: Markdown.
        manifest: JSON.
        report: JSON, what the gate found when it was released.
        forced: JSON by alias, who moved it here against the gate, and what the gate had said.
    """

    card: str
    manifest: str
    report: str
    forced: str


def inspect(version: TableVersion, *, tracking_uri: str, verbose: bool = False) -> Inspection:
    """Fetches and verifies the small files of a version.

    Raises:
        TableMismatchError: one of them is missing or is not what was published.
    """
    with tempfile.TemporaryDirectory() as scratch, connect(tracking_uri, limits=TRANSFER_LIMITS, verbose=verbose):
        folder, beside = Path(scratch), json.loads(version.tags.get(FILES_TAG, "{}"))
        try:
            texts = {MANIFEST_NAME: _fetched(version, MANIFEST_NAME, version.manifest_sha256, folder, tracking_uri)}
            listed = {entry.path: entry.sha256 for entry in table_manifest(folder).files}
            texts[CARD_NAME] = _fetched(version, CARD_NAME, listed.get(CARD_NAME, ""), folder, tracking_uri)
            if REPORT_NAME in beside:
                name = f"{BESIDE}/{REPORT_NAME}"
                texts[REPORT_NAME] = _fetched(version, name, beside[REPORT_NAME], folder, tracking_uri)
        except IncompleteTableError as error:
            raise TableMismatchError(
                f"{version.name} version {version.version} is not what was published: {error}"
            ) from error
    forced = {
        key.removeprefix(FORCED_TAG): json.loads(value)
        for key, value in version.tags.items()
        if key.startswith(FORCED_TAG)
    }
    return Inspection(
        texts[CARD_NAME],
        texts[MANIFEST_NAME],
        texts.get(REPORT_NAME, ""),
        json.dumps(forced, indent=1) + "\n" if forced else "",
    )


def _fetched(version: TableVersion, relative: str, sha256: str, folder: Path, tracking_uri: str) -> str:
    path = fetch_file(version, relative, folder, tracking_uri=tracking_uri)
    if (actual := sha256_file(path)) != sha256:
        raise IncompleteTableError(f"{relative} has sha256 {actual}, published was {sha256}")
    return path.read_text()
