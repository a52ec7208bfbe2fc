"""Work before and beside a fleet: authoring, evaluation, simulation, the test kit, the demo."""
