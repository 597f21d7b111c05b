"""Releases: merge, gates, verify, manifest."""
