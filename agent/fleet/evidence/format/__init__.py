"""The evidence folder's format: files, manifest, limits, framework mapping."""
