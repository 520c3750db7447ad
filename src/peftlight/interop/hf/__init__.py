"""HF PEFT's files as pure translations, both ways: one file for each of its methods, and what they share."""
