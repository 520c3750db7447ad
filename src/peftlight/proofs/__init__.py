"""Proofs that a user can run: trainings of their own configuration at small size, compared number by number."""
