"""Stages: argument -> config -> library call -> manifest."""
