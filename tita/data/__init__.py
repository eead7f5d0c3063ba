"""Datasets: the formats people have, converted at the edge to the records inside."""

from tita.data.jsonl import read_pairs, read_questions, write_pairs

__all__ = ["read_pairs", "read_questions", "write_pairs"]
