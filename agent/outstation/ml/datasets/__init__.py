"""Readers of data files: tables, recordings, and folders of images or sounds, one reader for each format."""
