"""Aligned answers for a person or a file: `tita infer`."""
