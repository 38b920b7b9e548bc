"""Erasing users, whatever they are in."""
