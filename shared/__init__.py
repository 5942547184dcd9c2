"""What every part of Maskline agrees on. Imports neither the API, the worker nor the command line."""
