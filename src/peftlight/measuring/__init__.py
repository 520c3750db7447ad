"""How far adapters move their base, in numbers, tables and pictures."""
