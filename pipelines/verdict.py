"""What a report says of retrieval, in words: the encoder against every other system."""

LABELS = {
    "tfidf": "TF-IDF",
    "pretrained": "encoder before the tasks",
    "without_blocks": "encoder without blocks",
    "oracle": "oracle (upper bound)",
}
UPPER_BOUNDS = ("oracle",)  # knows how the synthetic world was generated: a ceiling, not a competitor
RELATIVES = ("pretrained",)  # an earlier state of the encoder: tasks are to keep what it finds, not to find more


def compare_systems(systems: dict[str, dict[str, float]]) -> tuple[str, str]:
    """The verdict in words: a headline, and recall@10 of the encoder against every baseline.

    "Above" and "below" need a 95% interval of the difference, user by user, that excludes zero.

    Args:
        systems: retrieval metrics by name, `encoder` among them; or empty.
    """
    if not systems:
        return "Not evaluated", "There is no retrieval result."
    encoder = systems["encoder"]
    groups: dict[str, list[str]] = {"above": [], "not clearly above": [], "below": []}
    for name in ranked(systems):
        if name not in ("encoder", *UPPER_BOUNDS, *RELATIVES):
            groups[relation(systems, name)].append(name)
    phrases = []
    for standing, names in groups.items():
        rivals = [f"{label(name)} ({format_share(systems[name]['recall_at_10'])})" for name in names]
        if rivals:
            phrases.append(f"{standing} {' and '.join(filter(None, [', '.join(rivals[:-1]), rivals[-1]]))}")
    if groups["not clearly above"]:
        phrases.append("not clearly above means that the 95% interval of the difference includes zero")
    text = "; ".join(phrases) or "no baseline was evaluated"
    if "pretrained" in systems:
        text += f"; before the tasks it was {format_share(systems['pretrained']['recall_at_10'])}"
    headline = "Above every baseline" if groups["above"] else "No baseline to compare with"
    if groups["not clearly above"]:
        headline = f"Not clearly above {label(groups['not clearly above'][0]) if groups['above'] else 'any baseline'}"
    if groups["below"]:
        headline = f"Below {label(groups['below'][0])}"
    return headline, f"recall@10 {format_share(encoder['recall_at_10'])} {interval(encoder)}: {text}."


def relation(systems: dict[str, dict[str, float]], name: str) -> str:
    """Where the encoder stands: `above` or `below` a system, or `not clearly above` it."""
    other = systems[name]
    if name == "encoder" or other["lead_low"] <= 0 <= other["lead_high"]:
        return "not clearly above"
    return "above" if other["lead_low"] > 0 else "below"


def ranked(systems: dict[str, dict[str, float]]) -> list[str]:
    """The encoder, the baselines from the strongest to the weakest, the upper bounds."""
    return sorted(systems, key=lambda name: (name in UPPER_BOUNDS, name != "encoder", -systems[name]["recall_at_10"]))


def label(name: str) -> str:
    """Name of a system for people."""
    return LABELS.get(name, name.replace("_", " "))


def format_share(value: float) -> str:
    """Three decimals, without a leading zero: .432, 1.000."""
    return f"{value:.3f}".removeprefix("0") if value >= 0 else f"{value:.3f}"


def interval(system: dict[str, float]) -> str:
    """The 95% interval of its recall@10."""
    return f"[{format_share(system['recall_at_10_low'])}, {format_share(system['recall_at_10_high'])}]"
