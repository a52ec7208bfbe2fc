"""The device: readings in, results and alerts out. Its parts meet in the store only.

Folders, each importing only those before it: `store`, `machine`, `recovery` and `bundles`, `intake` and `pipeline`,
`rollout` and `uplink`, `commands`. Modules: `status`, `health`, and the main loop in `daemon`.
"""
