"""Other bundles for a device's tasks: what is desired, how it comes here, and how it proves itself or goes again."""
