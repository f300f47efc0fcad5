"""What happens when an agent turns anomalous: it is noticed, cut off, and people are told."""
