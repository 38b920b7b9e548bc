"""Tests of `userrep.publishing`."""
