"""Chaos: a mixed load, a seeded killer of everything that runs, and what must be true when the dust has settled."""
