"""Suites of evaluation sets: published files in, answers of several methods, one report out."""
