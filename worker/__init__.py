"""The workers: Celery processes that claim steps and run them, and the upkeep beside them. Imports `shared` alone."""
