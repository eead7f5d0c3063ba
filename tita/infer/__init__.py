"""Aligned answers in a terminal or a file: `tita infer`."""
