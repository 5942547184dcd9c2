"""The local stack: the service and its servers on one machine, from wheels. `maskline up`, the demo and the tests."""
