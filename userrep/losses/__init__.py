"""Losses as pure functions of tensors and a process group."""
