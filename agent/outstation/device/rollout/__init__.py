"""Roll-outs on a device: desired state, downloads, shadow evaluation, canary, and rollback."""
