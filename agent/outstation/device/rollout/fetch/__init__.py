"""Bundle downloads: TUF metadata and archives, fetched by a child process. Of the device it knows store and machine."""
