"""Named runs: functions that return a complete config."""
