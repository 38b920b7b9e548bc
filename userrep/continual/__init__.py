"""Continual tasks: methods that teach one encoder task after task."""
