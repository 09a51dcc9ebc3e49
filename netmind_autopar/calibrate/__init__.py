"""Measure the present machine and write its profile: docs/calibrate.md."""
