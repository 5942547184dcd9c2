"""The REST interface. Imports `shared` alone, and never torch."""
