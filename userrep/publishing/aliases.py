"""Aliases that remember where they pointed: moving one is a release, moving it back is a rollback.

A tag of the registered model, one for each alias, holds the versions that it pointed to before, the latest last. It is
written before the alias moves, so a crash in between loses nothing: an entry that the alias still points to is skipped.
"""

from collections.abc import Mapping

from mlflow import MlflowClient

from userrep.publishing.connection import WRITE_LIMITS, RegistryError, UnknownVersionError, connect
from userrep.publishing.versions import DELETED_TAG

HISTORY_TAG = "userrep.history."  # + alias
MAX_HISTORY = 100  # versions; a value of a tag may have 5,000 characters


def point_alias(client: MlflowClient, name: str, alias: str, version: int) -> int | None:
    """Points an alias to a version and notes where it pointed; inside a `connect` block.

    Returns:
        The version that it pointed to before.
    """
    registered = client.get_registered_model(name)
    before = registered.aliases.get(alias)
    if before is not None and int(before) != version:
        history = [*history_of(registered.tags, alias), int(before)]
        _write_history(client, name, alias, history)
    client.set_registered_model_alias(name, alias, str(version))
    return None if before is None else int(before)


def rollback(name: str, alias: str, *, tracking_uri: str, verbose: bool = False) -> tuple[int, int]:
    """Points an alias to the version that it pointed to before; again, to the one before that.

    Returns:
        The version that it pointed to, and the one that it points to now.

    Raises:
        UnknownVersionError: the table has no such alias, or the alias has no earlier version that still exists.
        RegistryError: there is no such table.
    """
    with connect(tracking_uri, limits=WRITE_LIMITS, verbose=verbose) as client:
        registered = client.get_registered_model(name)
        if alias not in registered.aliases:
            known = ", ".join(sorted(registered.aliases)) or "none"
            raise UnknownVersionError(f"table {name!r} has no alias {alias!r}; its aliases: {known}")
        current, history = int(registered.aliases[alias]), history_of(registered.tags, alias)
        kept = {
            int(found.version)
            for found in client.search_model_versions(f"name='{name}'")
            if DELETED_TAG not in found.tags
        }
        while history and (history[-1] == current or history[-1] not in kept):
            history.pop()
        if not history:
            raise UnknownVersionError(
                f"{name}@{alias} is version {current}, and no version that it pointed to before is left: "
                f"`userrep tables promote {name}@vN --to {alias}` takes any other"
            )
        # The alias moves first: killed in between, the entry is the current version, which is skipped.
        client.set_registered_model_alias(name, alias, str(history[-1]))
        _write_history(client, name, alias, history[:-1])
        return current, history[-1]


def history_of(tags: Mapping[str, str], alias: str) -> list[int]:
    """Versions that an alias pointed to before, the latest last, from the tags of the registered model.

    Raises:
        RegistryError: the tag is not one that this module wrote.
    """
    text = tags.get(HISTORY_TAG + alias, "")
    try:
        return [int(number) for number in text.split(",") if number]
    except ValueError as error:
        raise RegistryError(
            f"tag {HISTORY_TAG + alias!r} is {text!r}, wanted numbers of versions with commas: correct it in MLflow"
        ) from error


def _write_history(client: MlflowClient, name: str, alias: str, history: list[int]) -> None:
    client.set_registered_model_tag(name, HISTORY_TAG + alias, ",".join(map(str, history[-MAX_HISTORY:])))
