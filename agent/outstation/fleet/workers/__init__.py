"""Worker processes of the commands that read much of a fleet database."""
