"""Manifests as YAML documents, each below a comment that says why it is as it is."""

from typing import Any

import yaml


def document(manifest: dict[str, Any], comment: str) -> str:
    """One YAML document.

    Args:
        manifest: plain values.
        comment: lines above it, without the number sign.
    """
    lines = "".join(f"# {line}\n" for line in comment.split("\n")) if comment else ""
    return f"---\n{lines}{to_yaml(manifest)}"


def to_yaml(values: Any) -> str:
    """Plain values in their own order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes files as blocks, and repeats what is the same instead of naming it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
