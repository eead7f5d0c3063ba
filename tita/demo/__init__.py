"""The whole loop on one machine, on real handwritten digits and two tiny models of its own."""
