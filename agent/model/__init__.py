"""A model and what belongs to it.

manifest  what a bundle says of itself      runtime   the only importer of TFLite
bundle    read and verify a bundle          activate  probe in a child process, then load
features  rows to model windows             pack      make and sign a bundle
"""
