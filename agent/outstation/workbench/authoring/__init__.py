"""Authoring of bundles: SPEC, packing and calibration."""
