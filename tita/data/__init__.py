"""Datasets: the formats people have, converted at the edge to the records inside."""

from tita.data.dataset import Dataset, open_dataset, read_pairs, read_questions, write_pairs

__all__ = ["Dataset", "open_dataset", "read_pairs", "read_questions", "write_pairs"]
